"""An HTTP server that speaks OpenAI's chat completions for one deployed model."""
