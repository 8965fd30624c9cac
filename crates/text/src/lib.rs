//! Vocabulary, tokenizer, streaming detokenizer, chat templates, reasoning
