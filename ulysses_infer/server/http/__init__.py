"""The HTTP side of the server: OpenAI's wire format in, token ids to the engine, text back."""
