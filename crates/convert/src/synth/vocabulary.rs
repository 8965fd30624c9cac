//! A vocabulary of any size: a small tokenizer that works, and filler up to the size.
//!
//! ```text
//! 256 bytes │ beginnings of some English words, each with its merge │ filler │ four control tokens
//! ```
//!
//! Filler is ordinary text that no merge leads to, so prompts never hold it and answers may: of padding tokens, which are
//! never sampled, a server would have to keep a list that no real model makes it keep.

use paceline_gguf::Metadata;
use paceline_text::bpe::char_of_byte;

const WORDS: &str = "the of and to in is that it was for on are with as his they be at one have this from or had by not \
                     but what all were when we there can an your which their said if will each about how up out them";

/// Ends a text; begins a turn; ends a turn and an answer; stands for a token to be guessed.
const CONTROL: [&str; 4] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"];

const CHAT_TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                             {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Writes the tokenizer's keys for `n_vocab` tokens; `pre` names the pre-tokenizer.
pub(super) fn write(metadata: &mut Metadata, n_vocab: usize, pre: &str) {
    let mut tokens: Vec<String> = (0..=255).map(|byte| char_of_byte(byte).to_string()).collect();
    let mut merges = Vec::new();
    for word in WORDS.split_whitespace() {
        let mut left = char_of_byte(b' ').to_string();
        for letter in word.chars() {
            let joined = format!("{left}{letter}");
            if !tokens.contains(&joined) {
                merges.push(format!("{left} {letter}"));
                tokens.push(joined.clone());
            }
            left = joined;
        }
    }
    let n_text = n_vocab - CONTROL.len();
    assert!(
        tokens.len() <= n_text,
        "{n_vocab} tokens are too few for {} and the control tokens",
        tokens.len()
    );
    tokens.extend((tokens.len()..n_text).map(|id| format!("filler{id}")));
    tokens.extend(CONTROL.map(str::to_owned));
    let mut kinds = vec![1i32; n_text];
    kinds.resize(n_vocab, 3);

    let id = |text: &str| (n_text + CONTROL.iter().position(|c| *c == text).expect("one of them")) as u32;
    metadata.insert("tokenizer.ggml.model", "gpt2");
    metadata.insert("tokenizer.ggml.pre", pre);
    metadata.insert("tokenizer.ggml.bos_token_id", id("<|endoftext|>"));
    metadata.insert("tokenizer.ggml.eos_token_id", id("<|im_end|>"));
    metadata.insert("tokenizer.ggml.padding_token_id", id("<|endoftext|>"));
    metadata.insert("tokenizer.ggml.mask_token_id", id("<|mask|>"));
    metadata.insert("tokenizer.ggml.add_bos_token", false);
    metadata.insert("tokenizer.chat_template", CHAT_TEMPLATE);
    metadata.insert("tokenizer.ggml.tokens", tokens);
    metadata.insert("tokenizer.ggml.token_type", kinds);
    metadata.insert("tokenizer.ggml.merges", merges);
}
