//! Random numbers for ids and for seeds that nobody chose. Not for secrets.

use std::hash::{BuildHasher, Hasher, RandomState};

/// From the keys that the standard library draws for its hash maps.
pub(crate) fn random_u64() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// `n` letters and digits.
pub(crate) fn random_id(n: usize) -> String {
    const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let hasher = RandomState::new();
    (0..n).map(|i| char::from(LETTERS[(hasher.hash_one(i) % 62) as usize])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ() {
        let ids = [random_id(32), random_id(32), random_id(32)];
        assert!(ids.iter().all(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_alphanumeric())));
        assert!(ids[0] != ids[1] && ids[1] != ids[2] && random_u64() != random_u64());
    }
}
