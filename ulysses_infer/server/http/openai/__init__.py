"""OpenAI's completions and chat completions: request bodies to prompts, outputs to choices."""
