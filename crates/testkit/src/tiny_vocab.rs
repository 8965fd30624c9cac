//! A vocabulary that fits on a page and still has everything that goes wrong with real ones.
//!
//! Token `b` below 256 is the byte `b`, so every text can be written and most characters are split over tokens.
//! Then a few merges, among them a whole `é` and the first two bytes of `€`, then the special tokens.

use std::{collections::HashMap, sync::Arc};

use paceline_gguf::Metadata;
use paceline_text::{Vocab, bpe::char_of_byte};

use crate::Token;

/// Pairs of byte strings that merge, best first.
const MERGES: &[(&str, &[u8], &[u8])] = &[
    ("th", b"t", b"h"),
    ("the", b"th", b"e"),
    (" the", b" ", b"the"),
    ("ab", b"a", b"b"),
    ("é", &[0xc3], &[0xa9]),
    ("€ in part", &[0xe2], &[0x82]),
];

/// `<|endoftext|>`: ends a text.
pub const TEXT_END: Token = 256 + MERGES.len() as Token;
/// `<|im_start|>`: begins a turn, is not shown and does not end an answer.
pub const IM_START: Token = TEXT_END + 1;
/// `<|im_end|>`: ends a turn.
pub const IM_END: Token = TEXT_END + 2;
/// A row of padding, never to be sampled.
pub const PADDING: Token = TEXT_END + 3;

const N_VOCAB: usize = PADDING as usize + 1;

fn spelling(bytes: &[u8]) -> String {
    bytes.iter().map(|&b| char_of_byte(b)).collect()
}

/// The keys of a tokenizer, chat template included, as a model file has them.
pub fn tiny_metadata() -> Metadata {
    let mut tokens: Vec<String> = (0..=255).map(|b| spelling(&[b])).collect();
    tokens.extend(MERGES.iter().map(|(_, left, right)| spelling(&[*left, *right].concat())));
    tokens.extend(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD0]"].map(str::to_owned));
    let mut kinds = vec![1_i32; N_VOCAB];
    kinds[TEXT_END as usize..PADDING as usize].fill(3);
    kinds[PADDING as usize] = 5;
    let merges: Vec<String> =
        MERGES.iter().map(|(_, left, right)| format!("{} {}", spelling(left), spelling(right))).collect();
    let mut metadata = Metadata::new();
    metadata.insert("tokenizer.ggml.model", "gpt2");
    metadata.insert("tokenizer.ggml.pre", "qwen2");
    metadata.insert("tokenizer.ggml.tokens", tokens);
    metadata.insert("tokenizer.ggml.token_type", kinds);
    metadata.insert("tokenizer.ggml.merges", merges);
    metadata.insert("tokenizer.ggml.eos_token_id", IM_END);
    metadata.insert("tokenizer.ggml.add_bos_token", false);
    metadata.insert(
        "tokenizer.chat_template",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
         {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    );
    metadata
}

/// The vocabulary of [`tiny_metadata`].
pub fn tiny_vocab() -> Arc<Vocab> {
    Arc::new(Vocab::from_metadata(&tiny_metadata()).expect("a vocabulary made by hand"))
}

/// Logits that make a [`HashModel`](crate::HashModel) over [`tiny_vocab`] write letters, words, characters in
/// pieces, now and then an end, and padding where nobody forbids it.
pub fn tiny_bias() -> Vec<f32> {
    let liked: HashMap<Token, f32> =
        (b"abcdefghijklmnopqrstuvwxyz \n.".iter().map(|&b| (Token::from(b), 4.0)))
            // The bytes of é and €, which meet in the right order only sometimes.
            .chain([0xc3, 0xa9, 0xe2, 0x82, 0xac].map(|b| (b, 4.0)))
            .chain((256..TEXT_END).map(|t| (t, 4.0)))
            .chain([(IM_START, 3.0), (IM_END, 4.0), (TEXT_END, 2.0), (PADDING, 4.0)])
            .collect();
    (0..N_VOCAB as Token).map(|t| liked.get(&t).copied().unwrap_or(0.0)).collect()
}

/// A vocabulary of `n` tokens, each a letter or two, none special and none an end.
pub fn letters_vocab(n: usize) -> Arc<Vocab> {
    let letter = |i: usize| char::from(b'a' + (i % 26) as u8);
    let tokens: Vec<String> = (0..n)
        .map(|i| if i < 26 { letter(i).to_string() } else { format!("{}{}", letter(i / 26 - 1), letter(i)) })
        .collect();
    let mut metadata = Metadata::new();
    metadata.insert("tokenizer.ggml.model", "gpt2");
    metadata.insert("tokenizer.ggml.pre", "qwen2");
    metadata.insert("tokenizer.ggml.tokens", tokens);
    metadata.insert("tokenizer.ggml.merges", Vec::<String>::new());
    metadata.insert("tokenizer.ggml.add_bos_token", false);
    Arc::new(Vocab::from_metadata(&metadata).expect("a vocabulary made by hand"))
}
