// Opens one trace in Phoenix in a real browser, leaves a picture of it and prints the names of the spans that it shows.
//   node trace.mjs CHROMIUM PHOENIX TRACE_ID SCREENSHOT

import { chromium } from "playwright-core";

const [executablePath, phoenix, traceId, screenshot] = process.argv.slice(2);
const TIMEOUT_MS = 60000;

const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
  timeout: TIMEOUT_MS,
});
try {
  const page = await browser.newPage({ viewport: { width: 1500, height: 1150 }, colorScheme: "light" });
  page.setDefaultTimeout(TIMEOUT_MS);
  const { data: projects } = await (await fetch(`${phoenix}/v1/projects`)).json();
  await page.goto(`${phoenix}/projects/${projects[0].id}/traces/${traceId}`);
  await page.getByText("attention.request").first().waitFor();
  await page.getByText("expert_compute").first().waitFor();
  const text = await page.textContent("body");
  await page.getByText("expert_compute").first().click();
  await page.getByRole("tab", { name: "Attributes" }).click();
  await page.getByText("expertmesh.expert.rows").or(page.getByText('"rows"')).first().waitFor();
  await page.screenshot({ path: screenshot });
  console.log(JSON.stringify({ text }));
} finally {
  await browser.close();
}
