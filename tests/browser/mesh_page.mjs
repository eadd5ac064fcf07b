// Opens the page of a mesh in a real browser and prints what a person would see there, as JSON.
//   node mesh_page.mjs CHROMIUM URL LAYER SCREENSHOT [KEY]

import { chromium } from "playwright-core";

const [executablePath, url, layer, screenshot, key] = process.argv.slice(2);
const TIMEOUT_MS = 30000;

const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
  timeout: TIMEOUT_MS,
});
try {
  const page = await browser.newPage({ viewport: { width: 1360, height: 1500 } });
  page.setDefaultTimeout(TIMEOUT_MS);
  const problems = [];
  const requested = new Set();
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  page.on("request", (request) => requested.add(new URL(request.url()).origin));
  await page.goto(url);
  if (key) {
    await page.fill("#key", key);
    await page.click("#door button");
  }
  await page.waitForSelector("#layers tbody tr");
  await page.click(`#layers tbody tr:has(button:text-is("${layer}"))`);
  await page.waitForFunction((wanted) => document.querySelector(".chosen-layer").textContent === wanted, layer);
  await page.waitForFunction(() => document.getElementById("coactivation").width > 300);
  const texts = (selector) => page.$$eval(selector, (found) => found.map((each) => each.textContent.trim()));
  // How many colours a canvas shows: a blank one has one.
  const colours = (id) => page.$eval(`#${id}`, (canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size;
  });
  const canvas = await page.locator("#placement").boundingBox();
  await page.mouse.move(canvas.x + 155, canvas.y + 5);
  const seen = {
    state: await page.textContent("#state"),
    facts: await texts("#facts dd"),
    servers: await texts("#servers tbody tr td:first-child"),
    layers: await texts("#layers tbody tr td:first-child"),
    balancedness: await texts("#layers tbody tr td:nth-child(3)"),
    migrations: await page.textContent("#migration-counts"),
    hint: await page.textContent("#placement-hint"),
    colours: { placement: await colours("placement"), coactivation: await colours("coactivation") },
    events: await texts("#events li"),
    problems,
    origins: [...requested],
  };
  await page.screenshot({ path: screenshot });
  console.log(JSON.stringify(seen));
} finally {
  await browser.close();
}
