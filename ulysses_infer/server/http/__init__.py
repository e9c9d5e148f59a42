"""The HTTP application: OpenAI's wire format to token ids and back."""
