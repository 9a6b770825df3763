/** Realm's names, over the same code. */
import { InvalidRequestError } from "./errors.js";
import { WebSocketClient, type WebSocketOptions } from "./websocket.js";

export { WebSocketClient as RealmWebSocketClient };

/** The options of Realm's second client. */
export interface RealmOptions extends Omit<WebSocketOptions, "url" | "model"> {
  /** "server". "local", a model in this process, is refused: nothing here runs models. */
  mode?: "local" | "server" | undefined;
  /** What calls run on that name none. */
  defaultModel?: string | undefined;
  /** Of the server. */
  endpoint?: string | undefined;
}

/** Realm's second form: a mode, a default model, an endpoint. */
export class Realm extends WebSocketClient {
  constructor(options: RealmOptions = {}) {
    const { mode = "server", defaultModel, endpoint, ...rest } = options;
    if (mode !== "server") {
      throw new InvalidRequestError(
        `mode ${JSON.stringify(mode)} is not there: this client runs no models. Start a server, and use mode "server".`,
        { param: "mode", code: "unsupported" },
      );
    }
    super({ ...rest, model: defaultModel, url: endpoint });
  }
}
