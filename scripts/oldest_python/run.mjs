// Runs check.py in Pyodide. Arguments: the folder with Pyodide and the packages, the repository. Exit code 1: it failed.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const [build, repository] = process.argv.slice(2);
const { loadPyodide } = createRequire(join(build, "x.js"))("pyodide");
const python = await loadPyodide({ indexURL: join(build, "node_modules", "pyodide") + "/" });
for (const [name, root] of [["/site", join(build, "site")], ["/repository", repository]]) {
  python.FS.mkdir(name);
  python.FS.mount(python.FS.filesystems.NODEFS, { root }, name);
}
const check = readFileSync(join(repository, "scripts/oldest_python/check.py"), "utf8");
await python.runPythonAsync(check);
