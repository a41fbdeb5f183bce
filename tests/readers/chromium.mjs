// Open the page of examples/browser in headless Chromium and give it pictures; print what it shows, as JSON.
//     node chromium.mjs PAGE FOLDER CHROMIUM PICTURE...
// PAGE: examples/browser with its node_modules. FOLDER: model.onnx and float.onnx, served as if they lay beside it.

import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { extname, join, normalize, resolve } from "node:path";

const [page, folder, executablePath, ...pictures] = process.argv.slice(2).map((path) => resolve(path));
const { chromium } = createRequire(join(page, "package.json"))("playwright-core");
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm" };

const server = createServer((request, response) => {
  const path = normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
  const file = [page, folder].map((root) => join(root, path === "/" ? "index.html" : path)).find(existsSync);
  if (!file || !statSync(file).isFile()) return response.writeHead(404).end();
  response.writeHead(200, { "Content-Type": TYPES[extname(file)] ?? "application/octet-stream" });
  return createReadStream(file).pipe(response);
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const problems = [];
try {
  const tab = await browser.newPage();
  tab.setDefaultTimeout(500_000);
  tab.on("pageerror", (error) => problems.push(`${error}`));
  tab.on("requestfailed", (request) => problems.push(`not loaded: ${request.url()}`));
  await tab.goto(`http://127.0.0.1:${server.address().port}/`);
  await tab.waitForFunction(() => ["ready", "failed"].includes(document.body.dataset.state));
  const answers = [];
  for (const picture of pictures) {
    await tab.evaluate(() => (document.body.dataset.state = "asked"));
    await tab.setInputFiles("#file", picture);
    await tab.waitForFunction(() => ["done", "failed"].includes(document.body.dataset.state));
    const shown = (kind) => tab.$eval(`#${kind}`, (section) => ({ ...section.dataset, text: section.innerText }));
    answers.push({ state: await tab.$eval("#state", (p) => p.textContent), float: await shown("float"), int8: await shown("int8") });
  }
  if (process.env.SCREENSHOT) await tab.screenshot({ path: process.env.SCREENSHOT });
  console.log(JSON.stringify({ problems, answers }));
} finally {
  await browser.close();
  server.close();
}
