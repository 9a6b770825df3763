/** How long to wait before something is tried again: exponential, with full jitter, never below what the server said. */
export interface Backoff {
  /** How many times something is tried again; 0 never. */
  attempts: number;
  /** Attempt i (from 0) waits a random time of [0, min(mostMs, firstMs * 2 ** i)]. */
  firstMs: number;
  mostMs: number;
  /** A server that asks for a longer wait than this many seconds is not waited for: its error is raised at once. */
  longest: number;
  /** Gives a number of [0, 1); replaced in tests. */
  draw: () => number;
}

export const BACKOFF: Backoff = { attempts: 4, firstMs: 250, mostMs: 8000, longest: 60, draw: Math.random };

/** Milliseconds to wait before try number `attempt` is repeated, or undefined when it shall not be. */
export function wait(backoff: Backoff, attempt: number, retryAfter?: number): number | undefined {
  if (attempt >= backoff.attempts || (retryAfter ?? 0) > backoff.longest) return undefined;
  const jittered = backoff.draw() * Math.min(backoff.mostMs, backoff.firstMs * 2 ** attempt);
  return (retryAfter ?? 0) * 1000 + jittered;
}
