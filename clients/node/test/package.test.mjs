// The packed package: both builds are imported by name, its types hold, and the browser's needs nothing of node.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const away = mkdtempSync(join(tmpdir(), "dfastllm-client-"));
const installed = join(away, "node_modules", "@dfastllm", "client");
const NAMES = ["Client", "ClientError", "GenerationResult", "RateLimitError", "RealmWebSocketClient", "WebSocketClient"];

before(() => {
  const packed = execFileSync("npm", ["pack", "--ignore-scripts", "--json", "--pack-destination", away], { cwd: root });
  const [, name] = /"filename":\s*"([^"]+)"/.exec(String(packed));
  mkdirSync(installed, { recursive: true });
  execFileSync("tar", ["-xzf", join(away, name), "-C", installed, "--strip-components", "1"]);
});
after(() => rmSync(away, { recursive: true }));

test("import and require give the same names, from the packed files alone", () => {
  const show = `console.log(JSON.stringify(Object.keys(client).sort()))`;
  writeFileSync(join(away, "esm.mjs"), `import * as client from "@dfastllm/client";\n${show}`);
  writeFileSync(join(away, "cjs.cjs"), `const client = require("@dfastllm/client");\n${show}`);
  const [esm, cjs] = ["esm.mjs", "cjs.cjs"].map((file) => JSON.parse(execFileSync(process.execPath, [file], { cwd: away })));
  assert.deepEqual(esm, cjs);
  for (const name of NAMES) assert.ok(esm.includes(name), name);
});

test("only dist is packed, with types", () => {
  const files = readdirSync(installed).sort();
  assert.deepEqual(files, ["README.md", "dist", "package.json"]);
  for (const build of ["esm", "cjs"]) assert.ok(readdirSync(join(installed, "dist", build)).includes("index.d.ts"));
});

test("no build imports anything but its own files", () => {
  for (const build of ["esm", "cjs"]) {
    const folder = join(installed, "dist", build);
    for (const file of readdirSync(folder).filter((name) => name.endsWith(".js"))) {
      const code = readFileSync(join(folder, file), "utf8").replace(/\/\*[^]*?\*\//g, ""); // without comments
      for (const [, from] of code.matchAll(/(?:from|import|require)\s*\(?\s*["']([^"']+)["']/g)) {
        assert.match(from, /^\.\//, `${build}/${file}: ${from}`);
      }
    }
  }
});

test("the browser's build runs where there is nothing of node", () => {
  const script = `
    import assert from "node:assert/strict";
    import { readFileSync } from "node:fs";
    import { join } from "node:path";
    import vm from "node:vm";
    const folder = process.argv[1];
    const answer = { choices: [{ text: "42", finish_reason: "stop" }], usage: {}, dfastllm: {}, model: "m" };
    const fetch = async () => new Response(JSON.stringify(answer), { headers: { "content-type": "application/json" } });
    const browser = { fetch, AbortController, URL, URLSearchParams, TextDecoder, setTimeout, clearTimeout, crypto, WebSocket: class {} };
    const context = vm.createContext(browser);
    const known = new Map();
    const load = (name) => {
      if (!known.has(name)) known.set(name, new vm.SourceTextModule(readFileSync(join(folder, name), "utf8"), { context, identifier: name }));
      return known.get(name);
    };
    const entry = load("index.js");
    await entry.link((specifier) => load(specifier.slice(2)));
    await entry.evaluate();
    const { Client, WebSocketClient } = entry.namespace;
    const answers = [await new Client().generate("x")];
    delete browser.crypto; // as in Node 18
    answers.push(await new Client().generate("x"));
    assert.deepEqual(answers.map(String), ["42", "42"]);
    assert.notEqual(answers[0].requestId, answers[1].requestId);
    new WebSocketClient();
  `;
  const flags = ["--experimental-vm-modules", "--no-warnings", "--input-type=module", "-e", script];
  execFileSync(process.execPath, [...flags, join(installed, "dist", "esm")], { stdio: "pipe" });
});

test("the types hold", () => {
  const compiler = join(dirname(createRequire(import.meta.url).resolve("typescript/package.json")), "bin", "tsc");
  execFileSync(process.execPath, [compiler, "--project", "tsconfig.test.json"], { cwd: root, stdio: "pipe" });
});
