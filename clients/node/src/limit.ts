import { type Backoff, wait } from "./backoff.js";
import {
  CancelledError,
  type ClientError,
  ConnectionFailedError,
  NotReadyError,
  RateLimitError,
  TimeoutError,
} from "./errors.js";

const MOST_MS = 2 ** 31 - 1;

/** When a call must end: its time limit (from `start`) and the caller's AbortSignal as one signal; until `clear`. */
export class Limit {
  readonly signal: AbortSignal;
  readonly #controller = new AbortController();
  readonly #abort = (): void => this.stop(this.given?.reason);
  #timer: ReturnType<typeof setTimeout> | undefined;
  #ends = Infinity;
  #error: ClientError | undefined;

  constructor(
    readonly requestId: string,
    private readonly ms: number | undefined,
    private readonly given?: AbortSignal,
  ) {
    this.signal = this.#controller.signal;
  }

  start(): void {
    const { ms, requestId, given } = this;
    if (ms !== undefined) {
      this.#ends = Date.now() + ms;
      this.#wait(() => {
        this.#end(new TimeoutError(`The call took longer than ${ms / 1000} s, and was ended.`, { requestId }));
      });
    }
    if (given?.aborted) this.#abort();
    else given?.addEventListener("abort", this.#abort, { once: true });
  }

  /** Call `then` when the time is up. A timer takes 24 days at most, and fires at once for more. */
  #wait(then: () => void): void {
    const left = this.#ends - Date.now();
    this.#timer = setTimeout(() => (left > MOST_MS ? this.#wait(then) : then()), Math.min(left, MOST_MS));
  }

  /** End the call now. */
  stop(cause?: unknown): void {
    this.#end(new CancelledError("The call was aborted.", { requestId: this.requestId, code: "aborted", cause }));
  }

  #end(error: ClientError): void {
    this.#error ??= error;
    this.#controller.abort(this.#error);
  }

  /** Why the call was ended from this side, if it was. */
  get error(): ClientError | undefined {
    return this.#error;
  }

  clear(): void {
    clearTimeout(this.#timer);
    this.given?.removeEventListener("abort", this.#abort);
  }

  /** Wait, unless the call would have to end meanwhile: then false at once. Rejects when it is ended. */
  async sleep(ms: number): Promise<boolean> {
    if (this.#error !== undefined) throw this.#error;
    if (Date.now() + ms >= this.#ends) return false;
    await new Promise<void>((resolve, reject) => {
      const ended = (): void => {
        clearTimeout(timer);
        reject(this.#error);
      };
      const timer = setTimeout(() => {
        this.signal.removeEventListener("abort", ended);
        resolve();
      }, ms);
      this.signal.addEventListener("abort", ended, { once: true });
    });
    return true;
  }
}

/**
 * What `attempt` gives, tried again after a wait where nothing was run: it was refused with the time to come back, or
 * (connect) it could not be sent.
 */
export async function again<T>(
  attempt: () => Promise<T>,
  backoff: Backoff,
  limit: Limit,
  connect = true,
): Promise<T> {
  for (let tries = 0; ; tries++) {
    try {
      return await attempt();
    } catch (error) {
      const failed = error instanceof ConnectionFailedError && connect;
      const refused = error instanceof RateLimitError || error instanceof NotReadyError;
      if (!failed && !(refused && error.retryAfter !== undefined)) throw error;
      const ms = wait(backoff, tries, (error as ClientError).retryAfter);
      if (ms === undefined || !(await limit.sleep(ms))) throw error;
    }
  }
}
