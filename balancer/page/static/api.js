// What the balancer answers, and the API key where it asks for one. The key lives as long as the tab.

const KEY = "expertmesh-key";

export class Refused extends Error {}

export function keep(key) {
  sessionStorage.setItem(KEY, key);
}

export async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const response = await fetch(`api/${path}`, {
    headers: key ? { Authorization: `Bearer ${key}` } : {},
    signal: AbortSignal.timeout(5000),
  });
  if (response.ok) return response.json();
  const { error } = await response.json().catch(() => ({ error: response.statusText }));
  throw response.status === 401 ? new Refused(error) : new Error(error);
}
