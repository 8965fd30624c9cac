//! HTTP: the llama-server and OpenAI surface, and the one thread that steps the engine
