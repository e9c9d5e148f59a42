"""The recipe's section on the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_infer.config.option import option


@dataclass
class ServerConfig:
    """The HTTP server of `serve`."""

    host: str = option("127.0.0.1", help="Address to listen on; 0.0.0.0: all addresses of the machine.")
    port: int = option(8000, at_least=0, at_most=65535, help="Port to listen on; 0: any free one.")
    api_key: str | None = option(secret=True, help="Key that clients must send; null: no key is required.")
    admin_api_key: str | None = option(secret=True, help="Key for the administrative routes; null: they are disabled.")
    served_model_name: str | None = option(
        help="Model name that clients use; null: the hub id, or the name of the model's folder."
    )
    default_model: str | None = option(
        help="Name of the model or adapter for requests that name none; null: the model, if no adapters are served, "
        "else such requests are refused."
    )
    default_max_tokens: int | None = option(
        at_least=1,
        help="Maximum number of output tokens of requests that set none; null: the checkpoint's max_new_tokens, else "
        "what fits in model.max_model_len after the prompt (16 for /v1/completions, as in OpenAI's API).",
    )
    unknown_fields: str = option(
        "warn",
        choices=("warn", "reject"),
        help="Request fields that the server does not know. warn: ignore them, with one log line per field name; "
        "reject: answer 400. Those with the value null are always ignored.",
    )
    chat_template: str | None = option(help="File with the chat template to use instead of the checkpoint's.")
    trust_request_chat_template: bool = option(
        False, help="Accept chat templates in requests (chat_template). A template is a program that the server runs."
    )
    tokenizer_info: bool = option(
        False, help="Serve /tokenizer_info: the tokenizer's configuration, with the chat template."
    )
    tool_call_parser: str = option(
        "auto", help="Format of the model's tool calls; auto: detected from its chat template; none: not parsed."
    )
    reasoning_parser: str = option(
        "auto",
        help="Format of the model's reasoning (deepseek_r1, qwen3, glm45, mistral, openai_gptoss), which responses "
        "have apart from the content; auto: detected from the chat template; none: it stays in the content.",
    )
    max_num_queued_requests: int | None = option(
        1024, at_least=0, help="Maximum number of waiting requests; more are rejected with 503. null: no limit."
    )
    request_timeout: float | None = option(
        above=0, help="Seconds after which an unfinished request is ended with an error; null: never."
    )
    stream_interval: int = option(
        1, at_least=1, help="Tokens per stream event after the first; more tokens cost less but arrive less smoothly."
    )
    response_store_bytes: int = option(
        64 * 1024 * 1024,
        at_least=0,
        help="Memory for stored responses (/v1/responses), in bytes; the least recently used are forgotten. 0: none "
        "are stored.",
    )
    pooling: str | None = option(
        choices=("last", "mean", "cls"),
        help="How /v1/embeddings makes one vector of a prompt: the last token's hidden state, the mean, or the first "
        "token's. null: as the checkpoint's sentence-transformers config says, else last.",
    )
    score_tokens: list[str] = option(
        factory=list,
        help="The answers of a causal reranker, each one token, as [no, yes]; /v1/score and /v1/rerank then return the "
        "probability of the second. Empty: scores are cosines of vectors.",
    )
    score_template: str | None = option(
        help="Jinja file with the prompt of a causal reranker, which reads `query`, `document` and `instruction`; "
        "null: that of Qwen3-Reranker."
    )
    max_body_bytes: int = option(32 * 1024 * 1024, at_least=1, help="Maximum size of a request body, in bytes.")
    cors_origins: list[str] = option(
        factory=list, help='Web origins whose pages may call the server, as in [https://a.example]; ["*"]: all.'
    )
    ssl_certfile: str | None = option(help="Certificate (PEM) to serve HTTPS with; needs ssl_keyfile too.")
    ssl_keyfile: str | None = option(help="Private key (PEM) of ssl_certfile.")
    access_log: bool = option(False, help="Log every HTTP request, one JSON line each.")
    log_interval: float = option(10.0, above=0, help="Seconds between log lines on load and speed.")
    dashboard: bool = option(True, help="Serve the live page at /dashboard.")
    shutdown_timeout: float = option(
        30.0, at_least=0, help="Seconds that running requests have to finish after SIGTERM."
    )
    heartbeat_timeout: float = option(
        4.0, at_least=1, help="Seconds without a heartbeat after which a process of the job is considered hung."
    )
