"""The third door: the API for programs that are made for OpenAI's."""
