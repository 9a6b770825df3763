// The server's Prometheus metrics: what one call adds to them.
import assert from "node:assert/strict";
import { Client } from "@dfastllm/client";

const client = new Client({ url: process.env.DFASTLLM_URL, apiKey: process.env.DFASTLLM_API_KEY, model: "demo-ar" });

/** The sum of a counter of demo-ar over its other labels. */
function total(text, name) {
  const lines = text.matchAll(new RegExp(`^dfastllm_${name}\\{[^}]*model_name="demo-ar"[^}]*\\} (\\S+)$`, "gm"));
  return [...lines].reduce((sum, [, value]) => sum + Number(value), 0);
}

const before = await client.metrics();
const result = await client.generate({ prompt: "What is 12 + 30?", maxTokens: 16 });
const after = await client.metrics();

const wanted = {
  generation_tokens_total: result.tokensGenerated,
  prompt_tokens_total: result.promptTokens,
  request_success_total: 1,
};
for (const [name, value] of Object.entries(wanted)) {
  const grown = total(after, name) - total(before, name);
  console.log(`${name}: +${grown}`);
  assert.equal(grown, value, name);
}
