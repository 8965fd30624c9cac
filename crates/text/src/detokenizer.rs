//! Tokens to text, one at a time, without ever showing half a character.
//!
//! A token's bytes may end inside a UTF-8 character, which later tokens complete. Bytes that could still become a
//! character are held back, at most three; bytes that cannot become U+FFFD, one for each maximal ill-formed part
//! (Unicode 16, section 3.9, as `String::from_utf8_lossy`). All that is given out, put together, is therefore what
//! decoding all bytes at once would give.

use std::sync::Arc;

use crate::{Token, Vocab};

/// Turns the tokens of one answer into text.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    vocab: Arc<Vocab>,
    show_special: bool,
    held: Vec<u8>,
}

impl StreamDecoder {
    /// For one answer. `show_special` shows control tokens too.
    pub fn new(vocab: Arc<Vocab>, show_special: bool) -> StreamDecoder {
        StreamDecoder { vocab, show_special, held: Vec::new() }
    }

    /// The text that `token` completes; empty while a character is incomplete.
    pub fn push(&mut self, token: Token) -> String {
        self.held.extend_from_slice(self.vocab.bytes(token, self.show_special));
        take_text(&mut self.held)
    }

    /// What is held back, at the end of the answer: nothing, or U+FFFD for a character that never got complete.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        text
    }
}

/// Takes from `bytes` all that further bytes cannot change.
fn take_text(bytes: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut done = 0;
    loop {
        match std::str::from_utf8(&bytes[done..]) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let (valid, _) = bytes[done..].split_at(error.valid_up_to());
                text.push_str(std::str::from_utf8(valid).expect("valid up to there"));
                done += error.valid_up_to();
                match error.error_len() {
                    Some(len) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        done += len;
                    }
                    None => {
                        bytes.drain(..done);
                        return text;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bpe::char_of_byte;
    use crate::{TokenKind, TokenTable, TokenizerModel};

    /// A vocabulary whose token `b` is the byte `b`; token 256 is `<|end|>`.
    fn bytes_vocab() -> Arc<Vocab> {
        let mut table = TokenTable::new(TokenizerModel::ByteLevelBpe);
        table.tokens = (0..=255).map(|byte| char_of_byte(byte).to_string()).collect();
        table.tokens.push("<|end|>");
        table.kinds = vec![TokenKind::Normal; 256];
        table.kinds.push(TokenKind::Control);
        Arc::new(Vocab::new(&table).unwrap())
    }

    /// What each byte of `bytes` gives out, then the end.
    fn check(bytes: &[u8], expected: &[&str]) {
        let mut decoder = StreamDecoder::new(bytes_vocab(), false);
        let mut got: Vec<String> = bytes.iter().map(|b| decoder.push(Token::from(*b))).collect();
        got.push(decoder.finish());
        assert_eq!(got, expected, "{bytes:x?}");
    }

    #[test]
    fn characters_come_whole() {
        check("aé".as_bytes(), &["a", "", "é", ""]);
        check("😀".as_bytes(), &["", "", "", "😀", ""]);
        check(b"\xe2\x82", &["", "", "\u{fffd}"]);
        check(b"\xff", &["\u{fffd}", ""]);
        // A lead byte cannot follow a lead byte; the second one may still become a character.
        check(b"\xe2\xc3\xa9", &["", "\u{fffd}", "é", ""]);
        check(b"\xf0\x9fA", &["", "", "\u{fffd}A", ""]);
        check(b"\xed\xa0\x80", &["", "\u{fffd}\u{fffd}", "\u{fffd}", ""]);
    }

    #[test]
    fn control_tokens_show_only_when_asked() {
        let mut hidden = StreamDecoder::new(bytes_vocab(), false);
        let mut shown = StreamDecoder::new(bytes_vocab(), true);
        assert_eq!(hidden.push(256), "");
        assert_eq!(shown.push(256), "<|end|>");
    }

    proptest! {
        #[test]
        fn all_pushes_are_the_lossy_decoding(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0x80_u8..=0xff, prop::sample::select("é€😀a".as_bytes())], 0..40),
        ) {
            let mut decoder = StreamDecoder::new(bytes_vocab(), false);
            let mut got: String = bytes.iter().map(|b| decoder.push(Token::from(*b))).collect();
            got.push_str(&decoder.finish());
            prop_assert_eq!(got, String::from_utf8_lossy(&bytes));
        }
    }
}
