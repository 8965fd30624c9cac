//! Hugging Face directories to GGUF files
