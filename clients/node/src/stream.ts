import { ClientError, type Received } from "./errors.js";
import type { Limit } from "./limit.js";
import { type GenerationResult, type PipelineEvent, type PipelineResult, TokenData } from "./results.js";

/** The last part of a stream: what it came to. */
export class End<Result> {
  constructor(readonly result: Result) {}
}

/**
 * An answer as it grows: an async iterator of its pieces that knows, at any moment, what has come. Leaving a `for await`
 * early ends the work on the server. An error that ends the stream carries `received`.
 */
export class Stream<Piece extends TokenData | PipelineEvent, Result> implements AsyncIterableIterator<Piece> {
  #text = "";
  #tokens = 0;
  #result: Result | undefined;
  readonly #parts: AsyncGenerator<Piece | End<Result>>;
  readonly #limit: Limit;

  constructor(parts: AsyncGenerator<Piece | End<Result>>, limit: Limit) {
    this.#parts = parts;
    this.#limit = limit;
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  async next(): Promise<IteratorResult<Piece, undefined>> {
    try {
      const { value: part, done } = await this.#parts.next();
      if (done) return { value: undefined, done: true };
      if (part instanceof End) {
        this.#result = part.result as Result;
        await this.return();
        return { value: undefined, done: true };
      }
      this.#text += part.text;
      this.#tokens += part instanceof TokenData ? part.tokens : 0;
      return { value: part, done: false };
    } catch (error) {
      this.#limit.clear();
      if (error instanceof ClientError) error.received = this.received;
      throw error;
    }
  }

  /** End the call where it stands; nothing after its end. */
  async return(): Promise<IteratorResult<Piece, undefined>> {
    if (this.#result === undefined) this.#limit.stop();
    this.#limit.clear();
    await this.#parts.return(undefined).catch(() => undefined);
    return { value: undefined, done: true };
  }

  /** The same, under the name that says it. */
  async cancel(): Promise<void> {
    await this.return();
  }

  /** Only the texts that are not empty. */
  async *text(): AsyncGenerator<string> {
    for await (const piece of this) if (piece.text) yield piece.text;
  }

  get requestId(): string {
    return this.#limit.requestId;
  }

  /** What has come so far. */
  get received(): Received {
    return { text: this.#text, tokens: this.#tokens, requestId: this.requestId };
  }

  /** The whole answer. Throws before the stream has ended. */
  get result(): Result {
    if (this.#result === undefined) throw new Error("The stream has not ended; its result is there when it has.");
    return this.#result;
  }
}

export type TokenStream = Stream<TokenData, GenerationResult>;
export type PipelineStream = Stream<PipelineEvent, PipelineResult>;
