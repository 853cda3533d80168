"""The third door: the API that programs made for OpenAI speak."""
