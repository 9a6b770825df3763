// What can go wrong, and what each error says: wrong input, a time limit, one's own abort, a server that is not there.
import assert from "node:assert/strict";
import { CancelledError, Client, ConnectionFailedError, InvalidRequestError, NotFoundError, RateLimitError, TimeoutError } from "@dfastllm/client";

const options = { url: process.env.DFASTLLM_URL, apiKey: process.env.DFASTLLM_API_KEY, model: "demo-ar" };
const client = new Client(options);
const long = { prompt: "Count: 1 2 3", maxTokens: 400, ignore_eos: true };
const seen = [];

/** The error that `work` ends with, which must be of the class `kind`. */
async function fails(kind, work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof kind)) throw error;
    seen.push(error.code);
    return error;
  }
  throw new Error(`no ${kind.name}`);
}

console.log("no such model:", (await fails(NotFoundError, () => client.generate({ prompt: "Hello", model: "demo-nothing" }))).message);
console.log("misspelt:", (await fails(InvalidRequestError, () => client.generate({ prompt: "Hello", maxTokns: 5 }))).param);
console.log("too slow:", (await fails(TimeoutError, () => client.generate({ ...long, timeout: 0.01 }))).message);

const controller = new AbortController();
const aborted = await fails(CancelledError, async () => {
  for await (const piece of client.generateStream({ ...long, signal: controller.signal })) {
    if (piece.index >= 4) controller.abort();
  }
});
console.log(`aborted after ${aborted.received.tokens} tokens: ${JSON.stringify(aborted.received.text)}`);

// Refusals that say when to come back are waited for by themselves (see backoff); without that they are raised.
try {
  await new Client({ ...options, backoff: { attempts: 0 } }).generate({ prompt: "Hello", maxTokens: 1 });
  console.log("not limited");
} catch (error) {
  if (!(error instanceof RateLimitError)) throw error;
  console.log("come back in", error.retryAfter, "s");
}

const nobody = new Client({ url: "http://127.0.0.1:64999", backoff: { attempts: 1, firstMs: 10 } });
console.log("not sent:", (await fails(ConnectionFailedError, () => nobody.generate("Hello"))).message);
assert.deepEqual(seen, ["model_not_found", "unsupported", "timeout", "aborted", "connection_failed"]);
