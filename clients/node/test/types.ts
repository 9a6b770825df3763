// Compiled and never run: what the types promise to those who use them.
import { Client, type CanvasEvent, type GenerationOptions, Realm, TokenData, WebSocketClient, type wire } from "../src/index.js";

const client = new Client({ model: "m" });
const options: GenerationOptions = { prompt: "x", maxTokens: 3, max_tokens: 3, threshold: 0.9, signal: new AbortController().signal };

export async function uses(): Promise<number> {
  const stream = client.generateStream({ ...options, canvasEvents: true });
  let masked = 0;
  for await (const piece of stream) {
    const token: TokenData = piece;
    for (const event of token.canvas) masked = left(event, masked);
  }
  const text: string = stream.result.text;
  const many: wire.Completion = (await client.request("POST", "/v1/completions", { prompt: "x", n: 2 })) as wire.Completion;
  new WebSocketClient().on("connected", (tenant) => tenant.toUpperCase()).onError((error) => error.retryAfter?.toFixed());
  return text.length + many.choices.length + masked;
}

function left(event: CanvasEvent, before: number): number {
  switch (event.type) {
    case "stats":
      return event.masked;
    case "commit":
    case "provisional":
      return before - event.tokens.filter((token) => token.text.length > 0).length;
    case "revise":
      return before + event.tokens.filter((token) => token.token_id === null).length;
    case "block_done":
      return before;
  }
}

// @ts-expect-error: an option that there is not
void client.generate({ prompt: "x", maxTokns: 3 });
// @ts-expect-error: of another type
void client.generate({ prompt: "x", maxTokens: "3" });
// @ts-expect-error: a mode that there is not
new Realm({ mode: "remote" });
