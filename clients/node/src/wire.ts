// Made by `python -m clients.generate_types` from the server's openapi.json; do not edit.

export interface AdapterGone {
  id: string;
  object: "model";
  parent: string;
  deleted: true;
}

export interface AdapterView {
  name: string;
  model: string;
  rank: number;
  bytes: number;
  in_memory: boolean;
  /** Requests that hold it. */
  running: number;
}

export interface AuditLine {
  /** Seconds since 1970. */
  at: number;
  /** key:ID, or cli:USER. */
  actor: string;
  action: string;
  /** Id of what was changed. */
  target: string;
  /** What was set, as JSON. */
  detail: string;
}

export interface AuditList {
  object: "list";
  /** Newest first. */
  data: AuditLine[];
}

/** The last frame; the connection closes with 1008. */
export interface AuthFailed {
  type: "auth_failed";
  error: string;
}

/** The answer to `auth_required`. */
export interface AuthFrame {
  type: "auth";
  api_key: string;
}

/** The first frame where the server has keys and the request's head carried none. */
export interface AuthRequired {
  type: "auth_required";
}

export interface AuthSuccess {
  type: "auth_success";
  tenant_id: string;
}

/** A block became final. */
export interface BlockDoneEvent {
  type: "block_done";
}

/** A call. Its id is the client's; no two calls that run on a connection have the same. */
export interface CallFrame {
  id: string;
  function: string;
  /** As `metadata` lists them for the function. */
  params?: Record<string, unknown> | null;
  /** May be left out: the tenant comes from the key. Another one than the key's is refused. */
  tenant_id?: string | null;
}

export interface CalledFunction {
  name: string;
  /** A JSON object as text; empty or left out: no arguments. */
  arguments?: string | null;
  /** Taken and ignored: an output field that clients send back. */
  parsed_arguments?: unknown;
}

export interface CancelResult {
  /** Of the call that was ended; its own last frame has been sent. */
  id: string;
  cancelled: boolean;
}

export interface Cancelled {
  id: string;
  object: "request";
  /** Calls of the API that were ended. */
  cancelled: number;
}

/** The call was ended by `cancel` or by DELETE /v1/requests/{id}. */
export interface CancelledReply {
  id: string;
  status: "cancelled";
}

/** The typed events of one denoising step, with stream_options.canvas_events. */
export interface CanvasData {
  type: "canvas";
  choice: number;
  events: CanvasEvent[];
}

/** Positions count from the first new token. */
export interface CanvasToken {
  position: number;
  token_id: number;
  text: string;
}

export interface ChatChoice {
  index: number;
  message: ChatMessage;
  logprobs: ChatLogprobs | null;
  finish_reason: "stop" | "length" | "tool_calls";
  stop_reason?: string | number | null;
  token_ids?: number[] | null;
}

export interface ChatChunk {
  id: string;
  created: number;
  model: string;
  usage?: UsageOut | null;
  dfastllm?: Figures | null;
  canvas?: { index: number; events: CanvasEvent[] } | null;
  obfuscation?: string | null;
  object: "chat.completion.chunk";
  choices: ChatChunkChoice[];
}

export interface ChatChunkChoice {
  index: number;
  delta: Delta;
  logprobs?: ChatLogprobs | null;
  finish_reason: "stop" | "length" | "tool_calls" | null;
  stop_reason?: string | number | null;
  token_ids?: number[] | null;
}

export interface ChatCompletion {
  id: string;
  created: number;
  model: string;
  object: "chat.completion";
  choices: ChatChoice[];
  usage: UsageOut;
  dfastllm: Figures;
  prompt_token_ids?: number[] | null;
}

export interface ChatLogprobs {
  content: ChatTokenLogprob[];
}

export interface ChatMessage {
  role: "assistant";
  content: string | null;
  tool_calls?: ToolCallOut[] | null;
}

export interface ChatRequest {
  /** A name that GET /v1/models lists. May be left out where one model is served. */
  model?: string | null;
  stream?: boolean | null;
  stream_options?: StreamOptions | null;
  /**
   * Autoregressive: how this request drafts, with the models that the server has for it. What is left out is as
   * in the server's default (--speculative-config); where it has none, `method` is required and the rest has its
   * default.
   */
  speculative_config?: SpeculativeOptions | null;
  /** Choices carry token_ids too. */
  return_token_ids?: boolean | null;
  /** Log probabilities name tokens by their ids, "token_id:123". */
  return_tokens_as_token_ids?: boolean | null;
  /** The dfastllm block (of a stream: a last chunk) also says when the parts of each answer came. */
  timings?: boolean | null;
  /** As n; another number is refused. */
  best_of?: number | null;
  /** Number of completions of each prompt. Choice i of a seeded call draws with seed + i. Default: 1. */
  n?: number | null;
  /** Subtracted once from the logit of every token generated before. Default: 0.0. */
  presence_penalty?: number | null;
  /** Subtracted per occurrence from the logit of a token generated before. Default: 0.0. */
  frequency_penalty?: number | null;
  /**
   * Divides positive and multiplies negative logits of tokens seen before, the prompt's too; 1: off. Default:
   * 1.0.
   */
  repetition_penalty?: number | null;
  /** Randomness of the draw; 0: the best token (greedy). Default: 1.0; for a canvas 0.0. */
  temperature?: number | null;
  /** Draw from the smallest set of tokens with this much probability; 1: off, 0: the best token. Default: 1.0. */
  top_p?: number | null;
  /** Draw from the k best tokens; 0 or -1: off. Default: 0. */
  top_k?: number | null;
  /** Drop tokens less probable than this share of the best one; 0: off. Default: 0.0. */
  min_p?: number | null;
  /** Seed of the draws; the same request with the same seed gives the same tokens. Default: drawn anew. */
  seed?: number | null;
  /** Text that ends the completion, special tokens that are not shown included; repeatable. */
  stop?: string | string[] | null;
  /** Token id that ends the completion; repeatable. */
  stop_token_ids?: number[] | null;
  /** Go on after the end-of-text token. Default: false. */
  ignore_eos?: boolean | null;
  /**
   * New tokens at most; for diffusion the length of the canvas, rounded up to whole blocks. What lies beyond it
   * is not part of the output. A number that does not fit the context is refused. Default: what the context
   * leaves; for a canvas 128 of it at most, or as many as the steps given to blocks of a given length can fill.
   */
  max_tokens?: number | null;
  /** The newer name of max_tokens. */
  max_completion_tokens?: number | null;
  /** No end of the text before this many tokens; at most max_tokens. Default: 0. */
  min_tokens?: number | null;
  /** Report the log probability of each token. */
  logprobs?: boolean | null;
  /** With logprobs: report this many best ones of each position too. */
  top_logprobs?: number | null;
  /** Keep the stop text in the completion. Default: false. */
  include_stop_str_in_output?: boolean | null;
  /** Leave special tokens out of the text. Default: true. */
  skip_special_tokens?: boolean | null;
  /** Added to that token's logit; ID=BIAS, repeatable. */
  logit_bias?: Record<string, number> | null;
  /** Token id that may be generated, and no other; repeatable. Default: all. */
  allowed_token_ids?: number[] | null;
  /**
   * Diffusion: Unmasking rule by name: how positions are chosen. 'ar' on a checkpoint of both modes:
   * autoregression. Default: factor or threshold where that is given, else schedule.
   */
  rule?: string | null;
  /**
   * Diffusion: K,V reuse in masked diffusion. A block-diffusion model keeps the exact K,V of its finished blocks
   * and takes sub_block alone, for the block it writes. Default: dual for masked diffusion (none for a rule that
   * guesses ahead, and under guidance).
   */
  cache?: "none" | "prefix" | "dual" | "windowed" | "delayed" | "sub_block" | null;
  /** Diffusion: false is cache none; true the default. */
  use_cache?: boolean | null;
  /** Diffusion: false is cache prefix, true dual: also what follows the block. */
  use_dual_cache?: boolean | null;
  /**
   * Diffusion: Denoise steps over the whole canvas, at least one a block: a minimum rate. Each block commits its
   * fair share. Default: 128 for masked diffusion, or more if the canvas has more blocks; else one a token.
   */
  steps?: number | null;
  /**
   * Diffusion: Canvas tokens per block. Default: 32, wider for fewer steps, the last one shorter where the
   * context ends; the model's own block for block diffusion; the whole canvas for rule dream.
   */
  block_length?: number | null;
  /** Diffusion: Order of the fixed schedule. Default: low_confidence. */
  remasking?: "low_confidence" | "random" | "entropy" | "margin" | "sequential" | null;
  /** Diffusion: Unmask every position at least this sure. Default: the rule's. */
  threshold?: number | null;
  /**
   * Diffusion: Factor of the factor rule, a bar that follows the crowd; overrides threshold. Default: the
   * rule's.
   */
  factor?: number | null;
  /** Diffusion: Further options of the rule by its own names (docs/decoders.md); NAME=VALUE, repeatable. */
  rule_options?: Record<string, unknown> | null;
  /**
   * Diffusion: Classifier-free guidance of masked diffusion: each step also runs the canvas with the prompt
   * masked, and reads unguided + (cfg_scale + 1) * (logits - unguided); counts as two forward passes; 0: off.
   * Cache none. Default: 0.0.
   */
  cfg_scale?: number | null;
  /**
   * Diffusion: Never draw the end-of-text token, the first of the model's ending tokens (the others still end a
   * text). Default: false.
   */
  logits_eos_inf?: boolean | null;
  /**
   * Diffusion: Give candidates that would end the text confidence 0, and others theirs among the tokens that do
   * not, so that the ends are committed last. For rules that rank by confidence. Default: false.
   */
  confidence_eos_eot_inf?: boolean | null;
  /**
   * Diffusion: End once an end-of-text token is settled (lossless; a rule that revises ends with its block).
   * Default: true.
   */
  early_stop?: boolean | null;
  /** Diffusion: A preset of the other fields; a field that is given wins over it. Default: none. */
  mode?: "standard" | "fast" | "streaming" | "turbo" | null;
  /** Lower runs first. Default: 0. */
  priority?: number | null;
  /**
   * Seconds from arrival until the request ends with 504, waiting included; the server's limit at most. Default:
   * none (HTTP: the server's limit).
   */
  timeout?: number | null;
  /**
   * K,V of a common beginning are shared only among requests of the same salt. Refused by masked-diffusion
   * models, which share nothing. Default: shared among requests without one.
   */
  cache_salt?: string | null;
  /**
   * Name of the LoRA adapter that the request runs with, also [{id: NAME, scale: 1}]. Default: the one that
   * `model` names, else none.
   */
  lora?: string | LoraChoice[] | null;
  /** Another name of lora. */
  adapter_id?: string | null;
  /** No effect. The caller's own name for its user. */
  user?: string | null;
  /** No effect. Nothing is stored. */
  metadata?: Record<string, unknown> | null;
  /** No effect. Nothing is stored; true is refused. */
  store?: false | null;
  /** No effect. The caller's own. */
  safety_identifier?: string | null;
  /** No effect. There is one tier. */
  service_tier?: "auto" | "default" | "flex" | null;
  /** No effect. Common beginnings are shared anyway; see cache_salt. */
  prompt_cache_key?: string | null;
  /** No effect. Shared K,V stay while there is room. */
  prompt_cache_retention?: string | null;
  /** No effect. A wish, which no model here knows. */
  verbosity?: string | null;
  /** No effect. A wish, which no model here knows; see chat_template_kwargs. */
  reasoning_effort?: string | null;
  /** No effect. true is refused. */
  use_beam_search?: false | null;
  /** No effect. Of beam search; 1 asks for nothing. */
  length_penalty?: number | null;
  /** No effect. The older tool_choice; without functions none is called. */
  function_call?: "none" | null;
  /** No effect. An answer of a chat never repeats the prompt; true is refused. */
  echo?: false | null;
  /** No effect. The template writes them; true is refused. */
  add_special_tokens?: false | null;
  messages: Message[];
  tools?: Tool[] | null;
  /** auto when tools are given. required and a named function are refused: not guaranteed yet. */
  tool_choice?: "none" | "auto" | null;
  /** false: an answer ends with its first call. Default true: the model decides. */
  parallel_tool_calls?: boolean | null;
  response_format?: ResponseFormat | null;
  /** No effect: text is all there is. */
  modalities?: "text"[] | null;
  /** Whether the template opens the assistant's turn. Default true. */
  add_generation_prompt?: boolean | null;
  /** Variables of the chat template, such as enable_thinking. They win over the server's own. */
  chat_template_kwargs?: Record<string, unknown> | null;
  /**
   * Whether special tokens that messages and tools spell out become those tokens. Default: as the server was
   * started (--chat-parse-special), else false: they stay text.
   */
  parse_special?: boolean | null;
  /** true is refused: a turn is always new. */
  continue_final_message?: false | null;
}

export interface ChatTokenLogprob {
  token: string;
  logprob: number;
  bytes: number[];
  top_logprobs: TopLogprob[];
}

/** Masked positions that got their tokens. */
export interface CommitEvent {
  type: "commit";
  tokens: CanvasToken[];
}

export interface CompleteReply {
  id: string;
  status: "complete";
  data: GenerateResult | PipelineResult | HealthResult | MetadataResult | CancelResult;
}

export interface Completion {
  id: string;
  created: number;
  model: string;
  object: "text_completion";
  choices: CompletionChoice[];
  usage: UsageOut;
  dfastllm: Figures;
}

export interface CompletionChoice {
  index: number;
  text: string;
  logprobs: CompletionLogprobs | null;
  finish_reason: "stop" | "length" | null;
  stop_reason?: string | number | null;
  token_ids?: number[] | null;
  prompt_token_ids?: number[] | null;
}

export interface CompletionChunk {
  id: string;
  created: number;
  model: string;
  usage?: UsageOut | null;
  dfastllm?: Figures | null;
  canvas?: { index: number; events: CanvasEvent[] } | null;
  obfuscation?: string | null;
  object: "text_completion";
  choices: CompletionChoice[];
}

export interface CompletionLogprobs {
  tokens: string[];
  token_logprobs: number[];
  top_logprobs: (Record<string, number>)[] | null;
  text_offset: number[];
}

export interface CompletionRequest {
  /** A name that GET /v1/models lists. May be left out where one model is served. */
  model?: string | null;
  stream?: boolean | null;
  stream_options?: StreamOptions | null;
  /**
   * Autoregressive: how this request drafts, with the models that the server has for it. What is left out is as
   * in the server's default (--speculative-config); where it has none, `method` is required and the rest has its
   * default.
   */
  speculative_config?: SpeculativeOptions | null;
  /** Choices carry token_ids too. */
  return_token_ids?: boolean | null;
  /** Log probabilities name tokens by their ids, "token_id:123". */
  return_tokens_as_token_ids?: boolean | null;
  /** The dfastllm block (of a stream: a last chunk) also says when the parts of each answer came. */
  timings?: boolean | null;
  /** As n; another number is refused. */
  best_of?: number | null;
  /** Number of completions of each prompt. Choice i of a seeded call draws with seed + i. Default: 1. */
  n?: number | null;
  /** Subtracted once from the logit of every token generated before. Default: 0.0. */
  presence_penalty?: number | null;
  /** Subtracted per occurrence from the logit of a token generated before. Default: 0.0. */
  frequency_penalty?: number | null;
  /**
   * Divides positive and multiplies negative logits of tokens seen before, the prompt's too; 1: off. Default:
   * 1.0.
   */
  repetition_penalty?: number | null;
  /** Randomness of the draw; 0: the best token (greedy). Default: 1.0; for a canvas 0.0. */
  temperature?: number | null;
  /** Draw from the smallest set of tokens with this much probability; 1: off, 0: the best token. Default: 1.0. */
  top_p?: number | null;
  /** Draw from the k best tokens; 0 or -1: off. Default: 0. */
  top_k?: number | null;
  /** Drop tokens less probable than this share of the best one; 0: off. Default: 0.0. */
  min_p?: number | null;
  /** Seed of the draws; the same request with the same seed gives the same tokens. Default: drawn anew. */
  seed?: number | null;
  /** Text that ends the completion, special tokens that are not shown included; repeatable. */
  stop?: string | string[] | null;
  /** Token id that ends the completion; repeatable. */
  stop_token_ids?: number[] | null;
  /** Go on after the end-of-text token. Default: false. */
  ignore_eos?: boolean | null;
  /**
   * New tokens at most; for diffusion the length of the canvas, rounded up to whole blocks. What lies beyond it
   * is not part of the output. A number that does not fit the context is refused. Default: what the context
   * leaves; for a canvas 128 of it at most, or as many as the steps given to blocks of a given length can fill.
   */
  max_tokens?: number | null;
  /** No end of the text before this many tokens; at most max_tokens. Default: 0. */
  min_tokens?: number | null;
  /**
   * Report the log probability of each token and of this many best ones (command line: needs --json). Default:
   * none reported.
   */
  logprobs?: number | null;
  /** Keep the stop text in the completion. Default: false. */
  include_stop_str_in_output?: boolean | null;
  /** Leave special tokens out of the text. Default: true. */
  skip_special_tokens?: boolean | null;
  /** Added to that token's logit; ID=BIAS, repeatable. */
  logit_bias?: Record<string, number> | null;
  /** Token id that may be generated, and no other; repeatable. Default: all. */
  allowed_token_ids?: number[] | null;
  /**
   * Diffusion: Unmasking rule by name: how positions are chosen. 'ar' on a checkpoint of both modes:
   * autoregression. Default: factor or threshold where that is given, else schedule.
   */
  rule?: string | null;
  /**
   * Diffusion: K,V reuse in masked diffusion. A block-diffusion model keeps the exact K,V of its finished blocks
   * and takes sub_block alone, for the block it writes. Default: dual for masked diffusion (none for a rule that
   * guesses ahead, and under guidance).
   */
  cache?: "none" | "prefix" | "dual" | "windowed" | "delayed" | "sub_block" | null;
  /** Diffusion: false is cache none; true the default. */
  use_cache?: boolean | null;
  /** Diffusion: false is cache prefix, true dual: also what follows the block. */
  use_dual_cache?: boolean | null;
  /**
   * Diffusion: Denoise steps over the whole canvas, at least one a block: a minimum rate. Each block commits its
   * fair share. Default: 128 for masked diffusion, or more if the canvas has more blocks; else one a token.
   */
  steps?: number | null;
  /**
   * Diffusion: Canvas tokens per block. Default: 32, wider for fewer steps, the last one shorter where the
   * context ends; the model's own block for block diffusion; the whole canvas for rule dream.
   */
  block_length?: number | null;
  /** Diffusion: Order of the fixed schedule. Default: low_confidence. */
  remasking?: "low_confidence" | "random" | "entropy" | "margin" | "sequential" | null;
  /** Diffusion: Unmask every position at least this sure. Default: the rule's. */
  threshold?: number | null;
  /**
   * Diffusion: Factor of the factor rule, a bar that follows the crowd; overrides threshold. Default: the
   * rule's.
   */
  factor?: number | null;
  /** Diffusion: Further options of the rule by its own names (docs/decoders.md); NAME=VALUE, repeatable. */
  rule_options?: Record<string, unknown> | null;
  /**
   * Diffusion: Classifier-free guidance of masked diffusion: each step also runs the canvas with the prompt
   * masked, and reads unguided + (cfg_scale + 1) * (logits - unguided); counts as two forward passes; 0: off.
   * Cache none. Default: 0.0.
   */
  cfg_scale?: number | null;
  /**
   * Diffusion: Never draw the end-of-text token, the first of the model's ending tokens (the others still end a
   * text). Default: false.
   */
  logits_eos_inf?: boolean | null;
  /**
   * Diffusion: Give candidates that would end the text confidence 0, and others theirs among the tokens that do
   * not, so that the ends are committed last. For rules that rank by confidence. Default: false.
   */
  confidence_eos_eot_inf?: boolean | null;
  /**
   * Diffusion: End once an end-of-text token is settled (lossless; a rule that revises ends with its block).
   * Default: true.
   */
  early_stop?: boolean | null;
  /** Diffusion: A preset of the other fields; a field that is given wins over it. Default: none. */
  mode?: "standard" | "fast" | "streaming" | "turbo" | null;
  /** Lower runs first. Default: 0. */
  priority?: number | null;
  /**
   * Seconds from arrival until the request ends with 504, waiting included; the server's limit at most. Default:
   * none (HTTP: the server's limit).
   */
  timeout?: number | null;
  /**
   * K,V of a common beginning are shared only among requests of the same salt. Refused by masked-diffusion
   * models, which share nothing. Default: shared among requests without one.
   */
  cache_salt?: string | null;
  /**
   * Name of the LoRA adapter that the request runs with, also [{id: NAME, scale: 1}]. Default: the one that
   * `model` names, else none.
   */
  lora?: string | LoraChoice[] | null;
  /** Another name of lora. */
  adapter_id?: string | null;
  /** No effect. The caller's own name for its user. */
  user?: string | null;
  /** No effect. Nothing is stored. */
  metadata?: Record<string, unknown> | null;
  /** No effect. Nothing is stored; true is refused. */
  store?: false | null;
  /** No effect. The caller's own. */
  safety_identifier?: string | null;
  /** No effect. There is one tier. */
  service_tier?: "auto" | "default" | "flex" | null;
  /** No effect. Common beginnings are shared anyway; see cache_salt. */
  prompt_cache_key?: string | null;
  /** No effect. Shared K,V stay while there is room. */
  prompt_cache_retention?: string | null;
  /** No effect. A wish, which no model here knows. */
  verbosity?: string | null;
  /** No effect. A wish, which no model here knows; see chat_template_kwargs. */
  reasoning_effort?: string | null;
  /** No effect. true is refused. */
  use_beam_search?: false | null;
  /** No effect. Of beam search; 1 asks for nothing. */
  length_penalty?: number | null;
  /** Text, token ids, or a list of either. The end-of-text token is not added. */
  prompt: string | string[] | number[] | number[][];
  /** Diffusion models: text after the completion (infilling). */
  suffix?: string | null;
  /** The prompt precedes the completion. Not together with logprobs. */
  echo?: boolean | null;
  /** Whether the tokenizer puts its own special tokens around a text prompt. Default true. */
  add_special_tokens?: boolean | null;
  /** Whether special tokens that a text prompt spells out become those tokens. Default true. */
  parse_special?: boolean | null;
}

/** Calls are taken from now on. */
export interface Connected {
  status: "connected";
  /** Of the server. */
  version: string;
  tenant_id: string;
}

export interface Delta {
  role?: "assistant" | null;
  content?: string | null;
  tool_calls?: (ToolCallOut | ToolCallMore)[] | null;
}

export interface DetokenizeRequest {
  model?: string | null;
  tokens: number[];
}

export interface ErrorBody {
  error: ErrorDetails;
}

export interface ErrorDetails {
  /** What, got, wanted, and the way out. */
  message: string;
  type: string;
  /** The field of the request. */
  param: string | null;
  /** Stable, for programs. */
  code: string;
}

export interface ErrorInfo {
  code: "UNAUTHORIZED" | "RATE_LIMIT_EXCEEDED" | "INVALID_PARAMS" | "DISPATCH_ERROR" | "INTERNAL_ERROR";
  /** What, got, wanted, and the way out. */
  message: string;
  details?: ErrorOrigin | null;
  /** Seconds. */
  retry_after?: number | null;
}

/** The error as HTTP would tell it. */
export interface ErrorOrigin {
  status: number;
  /** Stable, for programs. */
  code: string;
  type: string;
  /** The param, or the field of the frame. */
  param: string | null;
}

export interface ErrorReply {
  /** null: it is about a frame that no call can be told of: not readable, or its id missing or in use. */
  id: string | null;
  status: "error";
  error: ErrorInfo;
}

/** What the answer took. */
export interface Figures {
  /** Forward passes. */
  nfe: number;
  tokens_per_forward: number;
  /**
   * Against the model's plain algorithm: reference (it is that), exact-fast (the same tokens), exact-
   * distribution (the same distribution, other tokens for a seed) or approximate.
   */
  exactness: string;
  queue_seconds: number;
  first_token_seconds: number | null;
  total_seconds: number;
  /** Diffusion: tokens of the canvas, of the longest one where there are several. */
  canvas_length?: number | null;
  /** Forward passes that verified a draft; speculative requests only. */
  drafts?: number | null;
  draft_tokens?: number | null;
  accepted_tokens?: number | null;
  /** Entry i: drafts of which at least i + 1 tokens were accepted. */
  accepted_per_position?: number[] | null;
  /** 1 + accepted_tokens / drafts. */
  acceptance_length?: number | null;
  /** One per choice, when the request has timings: true. */
  timings?: Timings[] | null;
}

export interface Function {
  name: string;
  description?: string | null;
  parameters?: Record<string, unknown> | null;
  /** A hint: arguments are not constrained yet. */
  strict?: boolean | null;
}

export interface FunctionCall {
  name: string;
  arguments: string;
}

export interface FunctionInfo {
  name: string;
  description: string;
  params: ParamInfo[];
  /** The type of `data` of the `complete` frame, among openapi.json's schemas. */
  returns: string;
  /** Whether `streaming` frames may come before. */
  streaming: boolean;
}

export interface FunctionMore {
  arguments: string;
}

/** The end of `generate`, streamed or not. */
export interface GenerateResult {
  /** Of the response; DELETE /v1/requests/{id} knows it while it runs. */
  id: string;
  model: string;
  /** The whole text of the first choice. */
  text: string;
  /** Of the first choice. */
  finish_reason: "stop" | "length" | "tool_calls";
  /** Of all choices; usage.completion_tokens. */
  tokens_generated: number;
  prompt_tokens: number;
  /** From the frame's arrival at the server to this one. */
  time_ms: number;
  /** Not of a streamed call: the choices as over HTTP, with logprobs, tool calls and token ids. */
  choices?: CompletionChoice[] | ChatChoice[] | null;
  usage: UsageOut;
  dfastllm: Figures;
}

export interface Health {
  status: "loading" | "ready" | "stopping" | "failed";
  /** Of a server that is ready and has no tenants. */
  models?: string[] | null;
}

export interface HealthResult {
  status: "loading" | "ready" | "stopping" | "failed";
  version: string;
  uptime_seconds: number;
  /** Those that are served and that this key may use. */
  models: string[];
}

export interface KeyCard {
  object: "key";
  /** The middle part of the key's text. */
  id: string;
  tenant_id: string;
  scopes: ("generate" | "adapters" | "pipelines" | "metrics" | "usage" | "admin")[];
  /** null: those of its tenant. */
  models: string[] | null;
  /** null: those of its tenant. */
  adapters: string[] | null;
  /** Seconds since 1970. */
  created: number;
  /** Seconds since 1970; null: never. */
  expires: number | null;
  disabled: boolean;
  note: string;
}

export interface KeyList {
  object: "list";
  data: KeyCard[];
}

/** The body of /v1/load_lora_adapter, vLLM's. */
export interface LoadLoraRequest {
  /** The name that requests will choose it by; without a colon. */
  lora_name: string;
  /** A PEFT directory below the server's --lora-root; a relative path begins there. */
  lora_path: string;
  /** The model that it is for. May be left out where one is served. */
  model?: string | null;
  /** Also where an adapter of that name is loaded: requests that run go on with the one they have. */
  load_inplace?: boolean | null;
}

/** An adapter of a request in llama-server's form. */
export interface LoraChoice {
  /** Its name; numbers are not taken. */
  id: string;
  /** 1; another number is refused. */
  scale?: number | null;
}

/**
 * One turn. What an assistant's message holds beside content and calls is taken, as clients send back whole
 * answers.
 */
export interface Message {
  role: "system" | "developer" | "user" | "assistant" | "tool" | "function";
  content?: string | (TextPart | RefusalPart)[] | null;
  name?: string | null;
  /** An empty list counts as none. */
  tool_calls?: MessageToolCall[] | null;
  tool_call_id?: string | null;
  /** The older form of one call in tool_calls. */
  function_call?: CalledFunction | null;
  /** The text of an assistant's message without content. */
  refusal?: string | null;
  /** Taken and ignored: an output field that clients send back. */
  annotations?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  audio?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  cache_control?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  finish_reason?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  id?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  parsed?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  provider_specific_fields?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  reasoning?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  reasoning_content?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  reasoning_details?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  status?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  thinking_blocks?: unknown;
}

export interface MessageToolCall {
  id: string;
  type?: "function" | null;
  function: CalledFunction;
  /** Taken and ignored: an output field that clients send back. */
  cache_control?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  index?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  provider_specific_fields?: unknown;
}

export interface MetadataResult {
  version: string;
  functions: FunctionInfo[];
}

export interface ModelCard {
  id: string;
  object: "model";
  created: number;
  owned_by: "dfastllm";
  /** The checkpoint's own name; of an adapter its directory. */
  root: string;
  /** Of an adapter: the model that it changes. */
  parent?: string | null;
  /** Prompt and answer together. */
  max_model_len: number;
  family: string;
  kind: "ar" | "diffusion" | "block";
}

export interface ModelList {
  object: "list";
  data: ModelCard[];
}

export interface ModelView {
  name: string;
  kind: string;
  /** Requests with a place in the batch. */
  running: number;
  waiting: number;
  /** Tokens decided, of the last seconds. */
  tokens_per_second: number;
  steps_per_second: number;
  /** Tokens decided for each sequence of a step. */
  tokens_per_forward: number | null;
  /** Pages of K,V in use, those of shared beginnings included. */
  pages: number;
  pages_total: number;
  /** Part of the prompt tokens looked up that were found in shared K,V. */
  prefix_hits: number | null;
  /** Part of the drafted tokens that stood. */
  accepted: number | null;
}

/** A WebAssembly module; one of the two. */
export interface ModuleBody {
  /** WebAssembly's text form. */
  wat?: string | null;
  /** Its binary form, as base64. */
  wasm?: string | null;
}

export interface NewKey {
  /** Name or id. */
  tenant: string;
  /** What it may do. Default: generate. */
  scopes?: ("generate" | "adapters" | "pipelines" | "metrics" | "usage" | "admin")[] | null;
  /** Models it may use. Default: those of its tenant. */
  models?: string[] | null;
  /** LoRA adapters it may use. Default: those of its tenant. */
  adapters?: string[] | null;
  /** Seconds since 1970. Default: never. */
  expires?: number | null;
  /** What it is for. */
  note?: string | null;
}

export interface NewKeyCard {
  object: "key";
  /** The middle part of the key's text. */
  id: string;
  tenant_id: string;
  scopes: ("generate" | "adapters" | "pipelines" | "metrics" | "usage" | "admin")[];
  /** null: those of its tenant. */
  models: string[] | null;
  /** null: those of its tenant. */
  adapters: string[] | null;
  /** Seconds since 1970. */
  created: number;
  /** Seconds since 1970; null: never. */
  expires: number | null;
  disabled: boolean;
  note: string;
  /** The key itself, in this answer only. */
  key: string;
}

export interface NewTenant {
  /** Share of the engine against other tenants: 2 gets twice what 1 gets. Default 1. */
  weight?: number | null;
  /** Requests in any 60 seconds. */
  requests_per_minute?: number | "none" | null;
  /** Tokens, prompts included, in any 60 seconds. */
  tokens_per_minute?: number | "none" | null;
  /** Requests at once. */
  max_concurrent?: number | "none" | null;
  /** Lowest number that a request's priority may have; lower runs first. Default 0. */
  priority_min?: number | null;
  /** Models it may use. Default: all. */
  models?: string[] | "all" | null;
  /** LoRA adapters it may use. Default: all. */
  adapters?: string[] | "all" | null;
  /** Letters, digits, '.', '_' and '-'; unique. */
  name: string;
}

export interface ParamInfo {
  name: string;
  /** A short type expression: string, integer, list[string], a | b. */
  type: string;
  description: string;
  required: boolean;
  /** What it is where it is not given; null: the model's own, or nothing. */
  default: unknown;
}

export interface Percentiles {
  p50: number;
  p90: number;
  p95: number;
  p99: number;
}

/** Steps that are run in the order in which they need each other; those that need nothing of each other at once. */
export interface PipelineBody {
  name: string;
  description?: string | null;
  modules?: Record<string, ModuleBody> | null;
  steps: StepBody[];
  /** A template; left out, the text of the last step that ran. */
  output?: string | null;
}

export interface PipelineCard {
  name: string;
  object: "pipeline";
  description: string;
  /** Their ids, in an order in which they may be run. */
  steps: string[];
  /** That its steps name. */
  models: string[];
  modules: string[];
}

export interface PipelineDeleted {
  name: string;
  deleted: true;
}

export interface PipelineDetail {
  name: string;
  object: "pipeline";
  description: string;
  /** Their ids, in an order in which they may be run. */
  steps: string[];
  /** That its steps name. */
  models: string[];
  modules: string[];
  /** The pipeline as it was sent. */
  document: Record<string, unknown>;
}

export interface PipelineList {
  object: "list";
  data: PipelineCard[];
}

/** The end of a run. */
export interface PipelineResult {
  type: "done";
  id: string;
  pipeline: string;
  output: string;
  steps: StepResult[];
  usage: UsageOut;
  time_ms: number;
}

export interface PromptTokensDetails {
  /** Prompt tokens whose K,V an earlier request had left. */
  cached_tokens: number;
}

/** The best guess of masked positions. */
export interface ProvisionalEvent {
  type: "provisional";
  tokens: CanvasToken[];
}

/** Of an assistant's message: it stands for its text. */
export interface RefusalPart {
  type: "refusal";
  refusal: string;
  /** Taken and ignored: an output field that clients send back. */
  annotations?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  cache_control?: unknown;
}

export interface RequestView {
  /** DELETE /v1/requests/{id} ends it. */
  id: string;
  model: string;
  tenant: string;
  adapter: string;
  /** Since it came. */
  seconds: number;
  prompt_tokens: number;
  /** Output tokens so far. */
  tokens: number;
}

export interface ResponseFormat {
  /** json_object and json_schema are refused: output is not constrained yet. */
  type: "text";
}

/** Committed positions that changed. */
export interface ReviseEvent {
  type: "revise";
  tokens: RevisedToken[];
}

/** null: the position is masked again. */
export interface RevisedToken {
  position: number;
  token_id: number | null;
  text: string | null;
}

export interface RotateKey {
  /** Seconds that the old key goes on. Default 0. */
  grace?: number | null;
}

export interface RunBody {
  /** What templates call `input`: a text, or an object of values. */
  input: string | Record<string, unknown>;
  /** Events as they come, server-sent. */
  stream?: boolean | null;
}

export interface SpeculativeOptions {
  /**
   * none: no drafts. ngram: prompt lookup. suffix: a suffix tree over the text and past outputs. draft_model: a
   * smaller autoregressive model. diffusion: a masked model drafts a block in one forward. self: the model's own
   * bidirectional mode drafts for its causal one. Default: none (HTTP: the server's).
   */
  method?: "none" | "ngram" | "suffix" | "draft_model" | "diffusion" | "self" | null;
  /** Most tokens drafted per step. Default: 5. */
  num_speculative_tokens?: number | null;
  /** Shortest n-gram that is looked up. Default: 2. */
  prompt_lookup_min?: number | null;
  /**
   * Longest n-gram that is looked up; at least prompt_lookup_min. Where only one of them is given, the other's
   * default gives way. Default: 5.
   */
  prompt_lookup_max?: number | null;
  /** coupled: the tokens of plain decoding at any temperature. rejection: their distribution. Default: coupled. */
  acceptance?: "coupled" | "rejection" | null;
  /**
   * The length follows the measured acceptance and cost, down to no drafts; false: always
   * num_speculative_tokens. Default: true.
   */
  adaptive?: boolean | null;
  /** Longest pattern of the suffix tree. Default: 24. */
  suffix_decoding_max_tree_depth?: number | null;
  /** Past outputs that the suffix tree keeps; 0: the request's own text only. Default: 1000. */
  suffix_decoding_max_cached_requests?: number | null;
  /** Tokens drafted per matched token. Default: 2.0. */
  suffix_decoding_max_spec_factor?: number | null;
  /** Least frequency of a drafted continuation. Default: 0.1. */
  suffix_decoding_min_token_prob?: number | null;
}

/** step: from 1. length: tokens of the canvas. masked: of them still masked. */
export interface StatsEvent {
  type: "stats";
  step: number;
  length: number;
  masked: number;
}

/** One step: a model or a module, what it is given, and when it is run. */
export interface StepBody {
  id: string;
  /** Of /v1/models; left out, the only one that is served. */
  model?: string | null;
  /** In place of a model: one of the pipeline's modules. */
  module?: string | null;
  /** A LoRA adapter of the model. */
  adapter?: string | null;
  /** A template: the prompt of a model, the text for a module. */
  input?: string | null;
  /** In place of input: a conversation, each content a template. */
  messages?: StepMessage[] | null;
  /** Fields of /v1/completions or /v1/chat/completions: max_tokens, temperature, stop, ... */
  options?: Record<string, unknown> | null;
  /** The name of its text for later steps; its id. */
  output?: string | null;
  /** An expression; where it is false the step is left out, its text ''. */
  when?: string | null;
}

export interface StepDone {
  type: "step_done";
  step: string;
  result: StepResult;
}

export interface StepMessage {
  role: "system" | "user" | "assistant";
  /** A template. */
  content: string;
}

/** One step of a run. usage: of a step with a model. */
export interface StepResult {
  id: string;
  status: "done" | "skipped";
  text: string;
  model?: string | null;
  finish_reason?: string | null;
  usage?: UsageOut | null;
  time_ms: number;
}

export interface StepSkipped {
  type: "step_skipped";
  step: string;
}

export interface StepStarted {
  type: "step_started";
  step: string;
}

/** New text of a step with a model. */
export interface StepText {
  type: "step_text";
  step: string;
  text: string;
}

export interface StreamOptions {
  /** A last chunk with empty choices carries the usage. */
  include_usage?: boolean | null;
  /** Every chunk with a choice carries the usage of that choice so far. */
  continuous_usage_stats?: boolean | null;
  /** Every chunk is filled up to a multiple of 64 bytes by `obfuscation`. Default false. */
  include_obfuscation?: boolean | null;
  /** Diffusion: Further chunks with empty choices carry the typed events of each denoising step in `canvas`. */
  canvas_events?: boolean | null;
}

export interface StreamingReply {
  id: string;
  status: "streaming";
  data: TokenData | CanvasData | StepStarted | StepText | StepDone | StepSkipped;
  obfuscation?: string | null;
}

export interface TenantCard {
  object: "tenant";
  id: string;
  name: string;
  weight: number;
  /** null: no limit, here and below. */
  requests_per_minute: number | null;
  tokens_per_minute: number | null;
  max_concurrent: number | null;
  priority_min: number;
  /** null: all. */
  models: string[] | null;
  /** null: all. */
  adapters: string[] | null;
  disabled: boolean;
}

export interface TenantChange {
  /** Share of the engine against other tenants: 2 gets twice what 1 gets. Default 1. */
  weight?: number | null;
  /** Requests in any 60 seconds. */
  requests_per_minute?: number | "none" | null;
  /** Tokens, prompts included, in any 60 seconds. */
  tokens_per_minute?: number | "none" | null;
  /** Requests at once. */
  max_concurrent?: number | "none" | null;
  /** Lowest number that a request's priority may have; lower runs first. Default 0. */
  priority_min?: number | null;
  /** Models it may use. Default: all. */
  models?: string[] | "all" | null;
  /** LoRA adapters it may use. Default: all. */
  adapters?: string[] | "all" | null;
  /** Its new name. */
  name?: string | null;
  /** Whether all its keys are refused. */
  disabled?: boolean | null;
}

export interface TenantList {
  object: "list";
  data: TenantCard[];
}

export interface TenantView {
  name: string;
  /** That wait or run. */
  requests: number;
  /** Output tokens of these so far. */
  tokens: number;
}

export interface Text {
  prompt: string;
}

export interface TextPart {
  type: "text";
  text: string;
  /** Taken and ignored: an output field that clients send back. */
  annotations?: unknown;
  /** Taken and ignored: an output field that clients send back. */
  cache_control?: unknown;
}

/** When the parts of one choice's answer came, in seconds. */
export interface Timings {
  /** (n - 1) / (last - first token); null when all came at once. */
  tokens_per_second: number | null;
  /** (end - first token) / (n - 1). */
  time_per_output_token_seconds: number | null;
  /** Tokens that came together share the gap. */
  inter_token_seconds: Percentiles | null;
  /** Each finished block of a canvas; the first with the prompt. */
  block_seconds: number[];
  /** Tokens until the first complete call of one of the tools. */
  first_tool_call_tokens: number | null;
  first_tool_call_seconds: number | null;
}

/** A part of one choice's answer as it grows. */
export interface TokenData {
  type: "token";
  /** Which answer it belongs to, from 0; n of them were asked for. */
  choice: number;
  /** New text; may be empty, as in the last part of an answer. */
  text: string;
  /** The same as text: Realm's name for it. Not always one token. */
  token: string;
  /** Tokens of this choice that came before; from 0. */
  index: number;
  /** Tokens that came with this part. */
  tokens: number;
  /** The last part of this choice. */
  is_final: boolean;
  /** Where log probabilities were asked for and one token came. */
  logprob?: number | null;
  /** As in a chunk over HTTP. */
  logprobs?: CompletionLogprobs | ChatLogprobs | null;
  /** With return_token_ids. */
  token_ids?: number[] | null;
  /** Pieces of calls, as over HTTP. */
  tool_calls?: (ToolCallOut | ToolCallMore)[] | null;
  /** Of the last part. */
  finish_reason?: "stop" | "length" | "tool_calls" | null;
  stop_reason?: string | number | null;
}

/** A prompt or messages. `model` may be left out where one model is served. */
export interface TokenizeRequest {
  model?: string | null;
  prompt?: string | null;
  messages?: Message[] | null;
  tools?: Tool[] | null;
  /** Of a prompt's text. Default true. */
  add_special_tokens?: boolean | null;
  /** As in a completion of the prompt, or in a chat of the messages. */
  parse_special?: boolean | null;
  /** Whether the template opens the assistant's turn. Default true. */
  add_generation_prompt?: boolean | null;
  /** Variables of the chat template, such as enable_thinking. They win over the server's own. */
  chat_template_kwargs?: Record<string, unknown> | null;
  return_token_strs?: boolean | null;
}

export interface Tokens {
  count: number;
  max_model_len: number;
  tokens: number[];
  /** The vocabulary's own spelling, on request; null for an id that has none. */
  token_strs?: (string | null)[] | null;
}

export interface Tool {
  type: "function";
  function: Function;
  /** Taken and ignored: an output field that clients send back. */
  cache_control?: unknown;
}

/** More of the arguments of a call that began earlier in the stream. */
export interface ToolCallMore {
  index: number;
  function: FunctionMore;
}

/** A call; in a stream its beginning, with an index, and arguments that are still empty. */
export interface ToolCallOut {
  index?: number | null;
  id: string;
  type: "function";
  function: FunctionCall;
}

export interface TopLogprob {
  token: string;
  logprob: number;
  bytes: number[];
}

/** The body of /v1/unload_lora_adapter, vLLM's. */
export interface UnloadLoraRequest {
  /** Also MODEL:ADAPTER. */
  lora_name: string;
  /** Where several models have an adapter of that name. */
  model?: string | null;
  /** No effect: adapters are known by their names. */
  lora_int_id?: number | null;
}

export interface UsageLine {
  /** Where the sums are by tenant, as the others are. */
  tenant?: string | null;
  model?: string | null;
  /** "" for none. */
  adapter?: string | null;
  key?: string | null;
  /** All; those that still run, or ended with their server, are in no other count. */
  requests: number;
  ok: number;
  cancelled: number;
  failed: number;
  prompt_tokens: number;
  completion_tokens: number;
  /** From beginning to end, summed up. */
  seconds: number;
}

export interface UsageList {
  object: "list";
  /** Seconds since 1970; null: from the beginning. */
  since: number | null;
  /** Seconds since 1970; null: up to now. */
  until: number | null;
  data: UsageLine[];
}

export interface UsageOut {
  prompt_tokens: number;
  /** Every generated token of the answers; an end of text that ended one is not part of it. */
  completion_tokens: number;
  total_tokens: number;
  /** Not in the usage so far of a chunk. */
  prompt_tokens_details?: PromptTokensDetails | null;
}

export interface Versions {
  version: string;
  torch: string;
  python: string;
}

export interface View {
  version: string;
  phase: string;
  uptime_seconds: number;
  models: ModelView[];
  adapters: AdapterView[];
  tenants: TenantView[];
  /** The oldest 100. */
  requests: RequestView[];
  requests_total: number;
}

export type CanvasEvent = BlockDoneEvent | CommitEvent | ProvisionalEvent | ReviseEvent | StatsEvent;
