import { type Backoff, BACKOFF } from "./backoff.js";
import { Limit } from "./limit.js";
import { type CallOptions, type GenerationOptions, callBody, milliseconds } from "./options.js";
import type { GenerationResult, HealthStatus, PipelineEvent, PipelineResult, RuntimeMetadata, TokenData } from "./results.js";
import { type End, type PipelineStream, Stream, type TokenStream } from "./stream.js";
import type { Message } from "./wire.js";

const GRACE_MS = 2000; // after a call's own time limit, in which the server's word about it comes

export interface CommonOptions {
  /** Sent as `Authorization: Bearer`, or in the opening exchange of a WebSocket. */
  apiKey?: string | undefined;
  /** What calls run on that name none. */
  model?: string | undefined;
  /** What a call may take that has no limit of its own. Default 300,000. */
  timeoutMs?: number | undefined;
  /** When what was not run is tried again. */
  backoff?: Partial<Backoff> | undefined;
}

export type Json = Record<string, unknown>;
/** The pieces of a stream, and last its end. */
export type Parts<Piece, Result> = AsyncGenerator<Piece | End<Result>>;

/** The calls of both transports, made of the few things that a transport must do. */
export abstract class Calls {
  readonly model: string | undefined;
  protected readonly backoff: Backoff;
  protected readonly timeoutMs: number;

  constructor(options: CommonOptions) {
    this.model = options.model;
    this.timeoutMs = milliseconds(options.timeoutMs ?? 300_000, "timeoutMs");
    this.backoff = { ...BACKOFF, ...options.backoff };
  }

  /**
   * The whole answer to a prompt, or to messages. Rejects with a ClientError: its subclasses say which. A call that was
   * sent is never sent again; one that was refused (429, 503), or could not be sent, is.
   */
  async generate(options: GenerationOptions | string): Promise<GenerationResult> {
    const { path, body } = callBody(options, this.model, false);
    return this.limited(options, (limit) => this.whole(path, body, limit));
  }

  /** The answer as it grows. */
  generateStream(options: GenerationOptions | string): TokenStream {
    const { path, body } = callBody(options, this.model, true);
    const limit = this.limit(options);
    return new Stream<TokenData, GenerationResult>(this.parts(path, body, limit), limit);
  }

  /** The answer to a conversation. */
  chat(messages: readonly Message[], options: Omit<GenerationOptions, "prompt"> = {}): Promise<GenerationResult> {
    return this.generate({ ...options, messages });
  }

  chatStream(messages: readonly Message[], options: Omit<GenerationOptions, "prompt"> = {}): TokenStream {
    return this.generateStream({ ...options, messages });
  }

  /** Run a pipeline that the server knows, to its end. */
  async executePipeline(name: string, input: unknown, options: CallOptions = {}): Promise<PipelineResult> {
    const stream = this.streamPipeline(name, input, options);
    for await (const _ of stream);
    return stream.result;
  }

  /** Run a pipeline: what its steps do, as it comes. */
  streamPipeline(name: string, input: unknown, options: CallOptions = {}): PipelineStream {
    const limit = this.limit(options);
    return new Stream<PipelineEvent, PipelineResult>(this.steps(name, input, limit), limit);
  }

  abstract health(): Promise<HealthStatus>;
  abstract metadata(): Promise<RuntimeMetadata>;
  /** End one of one's own calls, by the `requestId` of its stream or answer. false: it does not run. */
  abstract cancel(requestId: string): Promise<boolean>;

  protected abstract whole(path: string, body: Json, limit: Limit): Promise<GenerationResult>;
  protected abstract parts(path: string, body: Json, limit: Limit): Parts<TokenData, GenerationResult>;
  protected abstract steps(name: string, input: unknown, limit: Limit): Parts<PipelineEvent, PipelineResult>;

  /** When a call with these options must end here: some time after the server should have ended it. */
  protected limit(options: CallOptions | string, id = requestId()): Limit {
    const { timeout, signal }: CallOptions = typeof options === "string" ? {} : options;
    const ms = timeout === undefined || timeout === null ? this.timeoutMs : milliseconds(timeout, "timeout", 1000) + GRACE_MS;
    return new Limit(id, ms, signal);
  }

  /** What `work` gives within its limit. */
  protected async limited<T>(options: CallOptions | string, work: (limit: Limit) => Promise<T>, id?: string): Promise<T> {
    const limit = this.limit(options, id);
    limit.start();
    try {
      return await work(limit);
    } finally {
      limit.clear();
    }
  }
}

function requestId(): string {
  // A name, not a secret. Node 18 has no global crypto, browsers on plain http no randomUUID.
  const bytes = new Uint8Array(16);
  if (globalThis.crypto === undefined) bytes.forEach((_, at) => (bytes[at] = Math.floor(256 * Math.random())));
  else crypto.getRandomValues(bytes);
  return `c-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}
