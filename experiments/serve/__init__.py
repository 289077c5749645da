"""A server with OpenAI's interface, and a chat page: `python -m experiments.serve`."""
