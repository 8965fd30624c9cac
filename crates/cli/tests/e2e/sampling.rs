//! Seeds and probabilities, as they look from outside.

use serde_json::{Value, json};

use crate::{
    ask::{ASKED, chat, chat_prompt, native, user},
    server::Server,
};

#[test]
fn a_seed_is_an_answer() {
    let server = Server::shared("-np 2");
    let with_seed =
        |seed: u64| native(&server, chat_prompt(ASKED[2]), &json!({"temperature": 1.0, "seed": seed}));
    let first = with_seed(1);
    assert_eq!(with_seed(1), first);
    assert_ne!(with_seed(2).0.text, first.0.text);
    // Without one, a random seed is used and told, so that an answer can be had again.
    let open = server.ok("/completion", &json!({"prompt": chat_prompt(ASKED[2]), "n_predict": 16}));
    let seed = &open["generation_settings"]["seed"];
    assert!(seed.is_u64(), "{seed}");
    let again = json!({"prompt": chat_prompt(ASKED[2]), "n_predict": 16, "seed": seed});
    assert_eq!(server.ok("/completion", &again)["content"], open["content"]);
}

/// Every token has its probability, also those that a draft had guessed.
#[test]
fn probabilities_are_true_ones() {
    let server = Server::shared("-np 2");
    let (answer, drafted) = chat(&server, user(ASKED[2]), &json!({"top_logprobs": 5, "temperature": 1.0}));
    assert!(drafted.is_some_and(|(_, accepted)| accepted > 0), "{drafted:?}");
    let tokens: Vec<&Value> = answer.probabilities.as_array().into_iter().flatten().collect();
    assert!(tokens.len() > 30);
    let logprob = |token: &Value| token["logprob"].as_f64().unwrap_or(1.0);
    for token in &tokens {
        let top = token["top_logprobs"].as_array().cloned().unwrap_or_default();
        assert_eq!(top.len(), 5, "{token}");
        assert!(logprob(token) < 0.0, "{token}");
        assert!(top.is_sorted_by(|a, b| logprob(a) >= logprob(b)), "{token}");
        assert!(top.iter().map(|t| logprob(t).exp()).sum::<f64>() < 1.0 + 1e-5, "{token}");
        assert!(logprob(token) <= logprob(&top[0]), "{token}");
    }
    // At temperature 1 some choices are not the likeliest ones, and say so.
    assert!(tokens.iter().any(|token| token["id"] != token["top_logprobs"][0]["id"]));
}
