// Two tenants of one server: each with a key and limits of its own, and only its own usage to see.
// The server runs with --tenants-db; DFASTLLM_ADMIN_KEY has the scope admin (docs/tenants.md).
import assert from "node:assert/strict";
import { Client, NotFoundError, RateLimitError } from "@dfastllm/client";

const url = process.env.DFASTLLM_URL;
const admin = new Client({ url, apiKey: process.env.DFASTLLM_ADMIN_KEY });
const run = Math.random().toString(16).slice(2, 10);

async function tenantWithKey(name, limits) {
  await admin.request("POST", "/admin/v1/tenants", { name, ...limits });
  const made = await admin.request("POST", "/admin/v1/keys", { tenant: name, scopes: ["generate", "usage"] });
  return made.key; // shown this once
}

const keys = {
  large: await tenantWithKey(`large-${run}`, { weight: 2 }),
  small: await tenantWithKey(`small-${run}`, { models: ["demo-ar"], requests_per_minute: 2 }),
};

const answered = {};
for (const [name, apiKey] of Object.entries(keys)) {
  const client = new Client({ url, apiKey, model: "demo-ar", backoff: { attempts: 0 } });
  answered[name] = [];
  while (answered[name].length < 2) answered[name].push(await client.generate({ prompt: "What is 12 + 30?", maxTokens: 8 }));
  console.log(name, "got", answered[name][0].text.trim().split("\n")[0]);
}

const small = new Client({ url, apiKey: keys.small, model: "demo-ar", backoff: { attempts: 0 } });
await assert.rejects(small.generate({ prompt: "A third question in a minute", maxTokens: 8 }), (error) => {
  assert.ok(error instanceof RateLimitError, error);
  console.log(`small is over its limit; it may come back in ${error.retryAfter} s`);
  return true;
});
await assert.rejects(small.generate({ prompt: "Hello", model: "demo-diffusion" }), (error) => {
  assert.ok(error instanceof NotFoundError, error);
  console.log("small:", error.message);
  return true;
});

let used;
for (let tries = 0; tries < 50 && used?.ok !== 2; tries++) {
  if (tries) await new Promise((wait) => setTimeout(wait, 100)); // the last line of the ledger is written as the answer ends
  [used] = (await small.usage({ by: ["model"] })).data;
}
console.log("small used", used.completion_tokens, "tokens of", used.model);
assert.equal(used.completion_tokens, answered.small.reduce((sum, result) => sum + result.tokensGenerated, 0));
