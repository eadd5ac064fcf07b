"""The page of the live mesh: what the admin service tells, for a browser. It changes nothing."""
