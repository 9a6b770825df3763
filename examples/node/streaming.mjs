// An answer as it grows: token by token from an autoregressive model, as a canvas that fills in from a diffusion model.
import assert from "node:assert/strict";
import { Client } from "@dfastllm/client";

const client = new Client({ url: process.env.DFASTLLM_URL, apiKey: process.env.DFASTLLM_API_KEY });
const question = [{ role: "user", content: "What is 12 + 30?" }];

const tokens = client.chatStream(question, { model: "demo-ar", maxTokens: 32 });
for await (const text of tokens.text()) process.stdout.write(`${text}|`);
console.log(`\n${tokens.result.tokensGenerated} tokens`);
assert.match(tokens.result.text, /42/);

const masked = [];
const canvas = client.chatStream(question, { model: "demo-diffusion", maxTokens: 32, canvasEvents: true });
for await (const piece of canvas) {
  for (const event of piece.canvas) {
    if (event.type === "commit") console.log("committed:", event.tokens.map((token) => `${token.position} ${token.text}`));
    else if (event.type === "stats") masked.push(event.masked);
  }
}
console.log("still masked after each step:", masked.join(" "));
console.log("answer:", canvas.result.text);
assert.match(canvas.result.text, /42/);
assert.deepEqual(masked, [...masked].sort((a, b) => b - a));
