import { Calls, type CommonOptions, type Json, type Parts } from "./calls.js";
import {
  ClientError,
  ConnectionFailedError,
  ConnectionLostError,
  InvalidRequestError,
  NotFoundError,
  ProtocolError,
  ofResponse,
} from "./errors.js";
import { type Limit, again } from "./limit.js";
import { packed } from "./options.js";
import { AnswerReader, PipelineReader, health, ofAnswer, openapiMetadata } from "./reading.js";
import type { GenerationResult, HealthStatus, PipelineEvent, PipelineResult, RuntimeMetadata, TokenData } from "./results.js";
import { EventReader } from "./sse.js";
import { End } from "./stream.js";
import type { ModelCard, UsageList } from "./wire.js";

export interface ClientOptions extends CommonOptions {
  /** Of the server, with or without /v1. Default http://127.0.0.1:8000. */
  url?: string | undefined;
  headers?: Record<string, string> | undefined;
  /** In place of the global one. */
  fetch?: typeof fetch | undefined;
}

interface Sending {
  body?: Json | undefined;
  query?: Record<string, unknown> | undefined;
  /** It changes nothing, so a broken one counts as never sent. */
  repeat?: boolean;
  /** A refusal is an answer too. */
  refusals?: boolean;
}

// What node's fetch says when no connection was made. A browser does not say: then a call counts as sent.
const NEVER_SENT = new Set([
  "ECONNREFUSED",
  "ENOTFOUND",
  "EAI_AGAIN",
  "EHOSTUNREACH",
  "ENETUNREACH",
  "UND_ERR_CONNECT_TIMEOUT",
]);

function isUrl(text: string): boolean {
  try {
    return new URL(text).hostname !== "";
  } catch {
    return false;
  }
}

/** Calls over HTTP: the OpenAI routes of a dfastllm server and its own. */
export class Client extends Calls {
  readonly url: string;
  readonly #headers: Record<string, string>;
  readonly #fetch: typeof fetch;

  constructor(options: ClientOptions = {}) {
    super(options);
    const url = options.url ?? "http://127.0.0.1:8000";
    this.url = String(url).replace(/\/+$/, "").replace(/\/v1$/, "");
    if (!/^https?:\/\/./.test(this.url) || !isUrl(this.url)) {
      throw new InvalidRequestError(`The url of a server is like http://host:8000, got ${url}.`, { param: "url" });
    }
    this.#headers = { ...options.headers };
    if (options.apiKey !== undefined) this.#headers["authorization"] = `Bearer ${options.apiKey}`;
    this.#fetch = options.fetch ?? ((...given) => fetch(...given));
  }

  /** Of a server that loads or stops too: only one that cannot be reached rejects. */
  async health(): Promise<HealthStatus> {
    const sending = { refusals: true, repeat: true };
    const answer = await this.limited("", (limit) => this.#json("GET", "/health", sending, limit));
    const { version } = (await this.request("GET", "/version")) as { version: string };
    return health(answer as Json, version);
  }

  /** The operations of the server's openapi.json. */
  async metadata(): Promise<RuntimeMetadata> {
    return openapiMetadata((await this.request("GET", "/openapi.json")) as Json);
  }

  /** The models and adapters that this key may use; an adapter's `parent` is its base. */
  async models(): Promise<(ModelCard & Json)[]> {
    return ((await this.request("GET", "/v1/models")) as { data: (ModelCard & Json)[] }).data;
  }

  async cancel(requestId: string): Promise<boolean> {
    try {
      await this.request("DELETE", `/v1/requests/${encodeURIComponent(requestId)}`);
      return true;
    } catch (error) {
      if (error instanceof NotFoundError) return false;
      throw error;
    }
  }

  /**
   * Let the server load a LoRA adapter from a directory of its own, under its --lora-root; how it is listed then. model:
   * that it is for, where several are served. replace: also where one of that name is loaded.
   */
  async loadAdapter(
    name: string,
    path: string,
    { model, replace }: { model?: string; replace?: boolean } = {},
  ): Promise<ModelCard & Json> {
    const body = { lora_name: name, lora_path: path, model, load_inplace: replace };
    return (await this.request("POST", "/v1/load_lora_adapter", body)) as ModelCard & Json;
  }

  /** Forget an adapter; calls that run on it end as they would have. */
  async unloadAdapter(name: string, { model }: { model?: string } = {}): Promise<void> {
    await this.request("POST", "/v1/unload_lora_adapter", { lora_name: name, model });
  }

  /** What the tenant of this key used. since and until: "24h", a date; by: "model", "adapter", "key". */
  async usage(filters: { since?: string; until?: string; by?: readonly string[] } = {}): Promise<UsageList> {
    return (await this.request("GET", "/v1/usage", undefined, { query: filters })) as UsageList;
  }

  /** Prometheus metrics, as text. */
  async metrics(): Promise<string> {
    return this.limited("", async (limit) => (await this.#send("GET", "/metrics", { repeat: true }, limit)).text());
  }

  /** Register a pipeline, {name, steps: […]}, on the running server. */
  async registerPipeline(pipeline: Json): Promise<Json> {
    return (await this.request("POST", "/v1/pipelines", pipeline)) as Json;
  }

  /** Any route of the server; its JSON, undefined for an answer without. */
  async request(
    method: string,
    path: string,
    body?: Json,
    options: { query?: Record<string, unknown>; signal?: AbortSignal; requestId?: string } = {},
  ): Promise<unknown> {
    const sending = { body, query: options.query, repeat: method === "GET" };
    const work = (limit: Limit): Promise<unknown> =>
      again(() => this.#json(method, path, sending, limit), this.backoff, limit);
    return this.limited({ signal: options.signal }, work, options.requestId);
  }

  protected async whole(path: string, body: Json, limit: Limit): Promise<GenerationResult> {
    const answer = await again(() => this.#json("POST", path, { body }, limit), this.backoff, limit);
    return ofAnswer(answer as Json, limit.requestId);
  }

  protected async *parts(path: string, body: Json, limit: Limit): Parts<TokenData, GenerationResult> {
    const reader = new AnswerReader(limit.requestId);
    for await (const chunk of this.#events(path, body, limit)) {
      const piece = reader.chunk(chunk);
      if (piece !== undefined) yield piece;
    }
    yield new End(reader.ended());
  }

  protected async *steps(name: string, input: unknown, limit: Limit): Parts<PipelineEvent, PipelineResult> {
    const reader = new PipelineReader(limit.requestId);
    const path = `/v1/pipelines/${encodeURIComponent(name)}/run`;
    for await (const event of this.#events(path, { input, stream: true }, limit)) {
      yield event["type"] === "done" ? new End(reader.ended(event)) : reader.event(event);
    }
  }

  /** The events of a stream. Only its opening is tried again: what began is never sent twice. */
  async *#events(path: string, body: Json, limit: Limit): AsyncGenerator<Json> {
    limit.start();
    const answer = await again(() => this.#send("POST", path, { body }, limit), this.backoff, limit);
    const bytes = answer.body?.getReader();
    const reader = new EventReader();
    try {
      while (bytes !== undefined) {
        const { done, value } = await bytes.read();
        if (done) break;
        yield* reader.feed(value);
        if (reader.done) return;
      }
    } catch (error) {
      throw this.#broken(error, limit, false);
    } finally {
      await bytes?.cancel().catch(() => undefined);
    }
    throw this.#broken(new Error("the answer stopped before its end"), limit, false);
  }

  async #json(method: string, path: string, sending: Sending, limit: Limit): Promise<unknown> {
    const answer = await this.#send(method, path, sending, limit);
    let text: string;
    try {
      text = await answer.text();
    } catch (error) {
      throw this.#broken(error, limit, !!sending.repeat);
    }
    if (!answer.headers.get("content-type")?.startsWith("application/json")) return undefined;
    try {
      return JSON.parse(text);
    } catch (cause) {
      throw new ProtocolError(`${path} gave no JSON: ${text.slice(0, 200)}`, { cause });
    }
  }

  async #send(method: string, path: string, sending: Sending, limit: Limit): Promise<Response> {
    const query = Object.entries(sending.query ?? {}).flatMap(([name, value]) => {
      const values: unknown[] = value === undefined || value === null ? [] : Array.isArray(value) ? value : [value];
      return values.map((one) => [name, String(one)]);
    });
    const search = new URLSearchParams(query).toString();
    const headers: Record<string, string> = { ...this.#headers, "x-request-id": limit.requestId };
    if (sending.body !== undefined) headers["content-type"] = "application/json";
    let answer: Response;
    try {
      answer = await this.#fetch(`${this.url}${path}${search && `?${search}`}`, {
        method,
        headers,
        signal: limit.signal,
        ...(sending.body !== undefined && { body: packed(sending.body) }),
      });
    } catch (error) {
      throw this.#broken(error, limit, !!sending.repeat);
    }
    if (answer.ok || sending.refusals) return answer;
    const text = await answer.text().catch(() => "");
    let body: unknown = text;
    try {
      body = JSON.parse(text);
    } catch {
      // what is no JSON is shown as it is
    }
    throw ofResponse(answer.status, body, (name) => answer.headers.get(name), limit.requestId);
  }

  /** Why a request or an answer broke. repeat: it changes nothing, so it counts as never sent. */
  #broken(error: unknown, limit: Limit, repeat: boolean): unknown {
    if (limit.error !== undefined) return limit.error;
    if (error instanceof ClientError) return error;
    const cause = (error as { cause?: { code?: string; message?: string } }).cause;
    const why = cause?.message || cause?.code || (error as Error).message;
    const facts = { requestId: limit.requestId, cause: error };
    if (repeat || NEVER_SENT.has(cause?.code ?? "")) {
      return new ConnectionFailedError(`No connection to ${this.url}: ${why}. The call was not sent.`, facts);
    }
    return new ConnectionLostError(
      `The connection to ${this.url} broke: ${why}. The call was sent and is not sent again: it may have run.`,
      facts,
    );
  }
}
