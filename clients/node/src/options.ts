import { InvalidRequestError } from "./errors.js";
import type { ChatRequest, CompletionRequest, Message } from "./wire.js";

/** How a call runs here; nothing of it is sent but `timeout`. */
export interface CallOptions {
  /** Aborting it ends the call, on the server too; the call rejects with CancelledError. */
  signal?: AbortSignal | undefined;
  /** Seconds that the call may take on the server. */
  timeout?: number | undefined;
}

/** Options that most calls use, in camelCase. */
export interface NamedOptions {
  /** Text to complete, or its token ids; or else messages. */
  prompt?: string | readonly number[] | undefined;
  /** A chat. */
  messages?: readonly Message[] | undefined;
  /** A model the server lists, or an adapter of it; the client's, then the server's own where none is named. */
  model?: string | undefined;
  maxTokens?: number | undefined;
  temperature?: number | undefined;
  topP?: number | undefined;
  topK?: number | undefined;
  repetitionPenalty?: number | undefined;
  stop?: string | readonly string[] | undefined;
  seed?: number | undefined;
  /** The name of a LoRA adapter. */
  lora?: string | undefined;
  /** A stream of a diffusion model shows its denoising too (`TokenData.canvas`). */
  canvasEvents?: boolean | undefined;
}

type Wire = Omit<CompletionRequest, "prompt" | "stream"> & Omit<ChatRequest, "messages" | "stream">;

/**
 * What a call may ask for: every field of the server's bodies (docs/options.md) by its own name, or in camelCase, which
 * means the same (`maxTokens` is `max_tokens`). `stream` is taken for Realm's sake: which method is called decides.
 */
export type GenerationOptions = CallOptions &
  NamedOptions & { stream?: boolean | undefined } & { [Name in keyof Wire]?: Wire[Name] | undefined };

const LOCAL = new Set(["signal", "stream"]);

function snake(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}

/** A time limit in milliseconds. Throws InvalidRequestError for what is no finite number above 0. */
export function milliseconds(value: unknown, name: string, factor = 1): number {
  if (typeof value !== "number" || !Number.isFinite(value) || value <= 0) {
    throw new InvalidRequestError(`${name} must be a number above 0, got ${String(value)}.`, { param: name });
  }
  return value * factor;
}

/**
 * A call as JSON. Throws InvalidRequestError, before anything is sent, for what JSON does not hold and `JSON.stringify`
 * would leave out or turn into null: NaN, infinity, functions, BigInt, circles; naming the field.
 */
export function packed(body: unknown): string {
  const refuse = (name: string, what: string): never => {
    throw new InvalidRequestError(`${name || "The call"} cannot be sent as JSON: ${what}. Nothing was sent.`, {
      param: name || undefined,
    });
  };
  try {
    return JSON.stringify(body, (name, value: unknown) => {
      const kind = typeof value;
      if (kind === "number" && !Number.isFinite(value)) refuse(name, String(value));
      if (kind === "function" || kind === "symbol" || kind === "bigint") refuse(name, `a ${kind}`);
      return value;
    });
  } catch (error) {
    if (error instanceof InvalidRequestError) throw error;
    return refuse("", (error as Error).message.split("\n")[0] ?? "");
  }
}

/** The route of a call and its body. A stream asks for its usage and token ids, which the results are made of. */
export function callBody(
  options: GenerationOptions | string,
  model: string | undefined,
  stream: boolean,
): { path: string; body: Record<string, unknown> } {
  const given: GenerationOptions = typeof options === "string" ? { prompt: options } : options;
  if (typeof given !== "object" || given === null || Array.isArray(given)) {
    const got = Array.isArray(given) ? "a list" : String(given);
    throw new InvalidRequestError(`A call takes a prompt or an object of options, got ${got}.`, { param: "prompt" });
  }
  const body: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || LOCAL.has(name)) continue;
    const wire = snake(name);
    if (wire in body) throw new InvalidRequestError(`${wire} is given twice, in two spellings.`, { param: wire });
    body[wire] = value;
  }
  if (("prompt" in body) === ("messages" in body)) {
    throw new InvalidRequestError("Give either prompt or messages, and not both.", { param: "prompt" });
  }
  const prompts = Array.isArray(body["prompt"]) && typeof body["prompt"][0] !== "number" ? body["prompt"].length : 1;
  if ((body["n"] ?? 1) !== 1 || prompts > 1) {
    const [param, got] = prompts > 1 ? ["prompt", `${prompts} prompts`] : ["n", `n=${String(body["n"])}`];
    throw new InvalidRequestError(
      `These calls give one answer, got ${got}. Several: request("POST", "/v1/completions", …).`,
      { param },
    );
  }
  if (body["model"] === undefined && model !== undefined) body["model"] = model;
  const canvas = body["canvas_events"];
  delete body["canvas_events"];
  if (stream) {
    const asked = typeof body["stream_options"] === "object" ? body["stream_options"] : {};
    const wanted = { include_usage: true, ...(canvas === undefined ? {} : { canvas_events: canvas }) };
    Object.assign(body, { stream: true, stream_options: { ...asked, ...wanted }, return_token_ids: true });
  }
  return { path: "prompt" in body ? "/v1/completions" : "/v1/chat/completions", body };
}
