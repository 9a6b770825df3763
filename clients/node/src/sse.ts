import { ProtocolError } from "./errors.js";

/** Server-sent events: bytes as they arrive to the JSON objects of their data lines. */
export class EventReader {
  /** The server said `[DONE]`: the stream is whole. */
  done = false;
  readonly #decoder = new TextDecoder();
  #rest = "";

  /** The objects that are complete with `data`, which may be cut anywhere. */
  *feed(data: Uint8Array): Generator<Record<string, unknown>> {
    const lines = (this.#rest + this.#decoder.decode(data, { stream: true })).split("\n");
    this.#rest = lines.pop() ?? "";
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // an empty line ends an event; a comment keeps the connection open
      const text = line.slice(5).trim();
      if (text === "[DONE]") this.done = true;
      else yield object(text, "An event");
    }
  }
}

/** The JSON object that `text` is. Throws ProtocolError. */
export function object(text: string, what: string): Record<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new ProtocolError(`${what} that is no JSON: ${text.slice(0, 200)}`, { cause });
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new ProtocolError(`${what} that is no object: ${text.slice(0, 200)}`);
  }
  return value as Record<string, unknown>;
}
