//! Every dialect of drafter files says the same, so the same weights draft the same bits.

use std::sync::{Arc, Mutex};

use paceline_backend::{
    Backend, Error, Exec, Plan, PlanWork, StateConfig, StateDecl, States, Tap, WeightId, WeightSource,
    cpu::CpuBackend,
};
use paceline_gguf::GgmlType;
use paceline_spec::{Draft, LoadDrafter, load};

use crate::rig::{
    GREEN, MASK, N_VOCAB, Parts, Rig, STATES, Target, Tensor, agrees, likeliest, random_drafter,
};

fn upstream() -> Parts {
    Parts::golden("dflash")
}

/// `parts`, upstream, with its own keys moved behind `prefix` and counted from 0.
fn with_ids(parts: Parts, arch: &str, ids: Vec<u32>) -> Parts {
    let key = |suffix: &str| format!("{arch}.dflash.{suffix}");
    parts
        .move_keys("dflash.", &format!("{arch}."))
        .set("general.architecture", arch)
        .unset(&format!("{arch}.target_layers"))
        .unset(&format!("{arch}.target_hidden_size"))
        .unset(&format!("{arch}.block_size"))
        .unset("tokenizer.ggml.mask_token_id")
        .set(&key("target_layer_ids"), ids)
        .set(&key("n_target_features"), 120u32)
        .set(&key("block_size"), 6u32)
        .set(&key("mask_token_id"), MASK)
}

/// As beellama, buun and ik_llama.cpp write it: a flag for causality that means nothing.
fn dflash_draft(arch: &str) -> Parts {
    with_ids(upstream(), arch, vec![1, 3, 6])
        .set(&format!("{arch}.attention.causal"), false)
        .rename("fc.weight", "dflash_fc.weight")
        .rename("enc.output_norm", "dflash_hidden_norm")
        .rename(".ffn_norm", ".post_attention_norm")
}

/// Their names in lucebox files.
fn lucebox_names(parts: Parts) -> Parts {
    parts.rename("fc.weight", "dflash.fc.weight").rename("enc.output_norm", "dflash.hidden_norm")
}

/// Lucebox's first form: no taps, no windows, a rotary base only if somebody added it.
fn qwen35_dflash_draft() -> Parts {
    let arch = "qwen35-dflash-draft";
    lucebox_names(with_ids(upstream(), arch, vec![1, 2, 4]))
        .unset(&format!("{arch}.dflash.target_layer_ids"))
        .set(&format!("{arch}.dflash.n_target_layers"), 3u32)
}

fn gemma4_dflash_draft() -> Parts {
    let arch = "gemma4-dflash-draft";
    lucebox_names(with_ids(upstream(), arch, vec![1, 3, 6]))
        .set(&format!("{arch}.dflash.n_target_layers"), 7u32)
        .unset(&format!("{arch}.attention.sliding_window_pattern"))
}

fn drafts(parts: &Parts) -> Vec<Draft> {
    Rig::of("dflash", parts).drafts()
}

/// Both load, mean the same layers, and draft the same tokens, equally sure of them: a share of a vocabulary depends on its order of additions.
fn check(parts: Parts, same_as: &Parts) {
    let (mut got, mut want) = (Rig::of("dflash", &parts), Rig::of("dflash", same_as));
    assert_eq!(got.drafter.taps(), want.drafter.taps());
    let (drafts, expected) = (got.drafts(), want.drafts());
    let tokens = |drafts: &[Draft]| drafts.iter().map(|draft| draft.tokens.clone()).collect::<Vec<_>>();
    assert_eq!(tokens(&drafts), tokens(&expected), "{}", got.drafter.contract());
    for (got, want) in drafts.iter().zip(&expected).flat_map(|(a, b)| a.q.iter().zip(&b.q)) {
        assert!((got - want).abs() < 1e-5, "{got} {want}");
    }
}

#[test]
fn the_converters_own_dialect_says_its_contract() {
    let parts = upstream();
    assert_eq!(Rig::of("dflash", &parts).red(), GREEN);
    let contract = |parts: &Parts| Rig::of("dflash", parts).drafter.contract();
    assert_eq!(
        contract(&parts),
        "dflash: arch dflash, tensors fc, taps [1, 3, 6] (from 0), block 6, mask token 113, \
         layers [causal/8 full causal/8], rope base 1000000, embedding target's, head target's"
    );
    assert_eq!(
        contract(&dflash_draft("dflash-draft")),
        "dflash: arch dflash-draft, tensors dflash_fc, taps [1, 3, 6] (from 0), block 6, mask token 113, \
         layers [causal/8 full causal/8], rope base 1000000, embedding target's, head target's"
    );
}

#[test]
fn dflash_draft_files() {
    let arch = "dflash-draft";
    let parts = dflash_draft(arch);
    check(parts.clone(), &upstream());
    check(parts.clone().rename(".post_attention_norm", ".ffn_norm"), &upstream());
    let signed = parts.clone().set("dflash-draft.dflash.target_layer_ids", vec![1i32, 3, 6]);
    check(signed, &upstream());
    // The flag means nothing here, whatever it says.
    check(parts.clone().set("dflash-draft.attention.causal", true), &upstream());
    check(parts.unset("dflash-draft.attention.causal"), &upstream());
}

#[test]
fn dflash_files_with_the_tensors_of_dflash_draft() {
    check(dflash_draft("dflash"), &upstream());
    // A repack that renames the architecture and not the keys.
    check(dflash_draft("dflash-draft").set("general.architecture", "dflash"), &upstream());
}

#[test]
fn keys_with_either_prefix_are_read() {
    for key in ["dflash.mask_token_id", "dflash-draft.dflash.mask_token_id", "dflash-draft.mask_token_id"] {
        check(upstream().unset("tokenizer.ggml.mask_token_id").set(key, MASK), &upstream());
    }
    for key in ["dflash.dflash.block_size", "dflash-draft.dflash.block_size", "dflash-draft.block_size"] {
        check(upstream().unset("dflash.block_size").set(key, 6u32), &upstream());
    }
    check(dflash_draft("dflash-draft").move_keys("dflash-draft.dflash.", "dflash."), &upstream());
    check(dflash_draft("dflash-draft").move_keys("dflash-draft.", "dflash."), &upstream());
    // Optional ones, there or not.
    check(upstream().unset("dflash.target_hidden_size"), &upstream());
    check(upstream().unset("dflash.target_hidden_size").set("dflash.n_target_features", 120u32), &upstream());
    check(upstream().unset("dflash.vocab_size"), &upstream());
}

#[test]
fn qwen35_dflash_draft_files_spread_their_taps() {
    let same = upstream().set("dflash.target_layers", vec![2u32, 3, 5]);
    assert_eq!(Rig::of("dflash", &qwen35_dflash_draft()).drafter.taps(), [1, 2, 4].map(Tap::Layer));
    check(qwen35_dflash_draft(), &same);
}

#[test]
fn gemma4_dflash_draft_files_window_every_layer() {
    let same = upstream().set("dflash.attention.sliding_window_pattern", vec![true, true, true]);
    check(gemma4_dflash_draft(), &same);
    // The same of any file with a window and no pattern.
    check(upstream().unset("dflash.attention.sliding_window_pattern"), &same);
}

/// The shape of the published drafter for a Gemma 4 target of 60 layers.
#[test]
fn six_taps_of_sixty_layers_and_a_pattern() {
    let pattern = vec![true, true, true, true, false];
    let parts = random_drafter(&[2, 13, 24, 36, 47, 58], 5)
        .set("dflash.attention.sliding_window", 2048u32)
        .set("dflash.attention.sliding_window_pattern", pattern);
    let drafter = Target::ends(60, 256, 97).load(parts.file()).unwrap();
    assert_eq!(drafter.taps(), [1, 12, 23, 35, 46, 57].map(Tap::Layer));
    assert_eq!(drafter.n_draft_max(), 15);
    assert_eq!(
        drafter.contract(),
        "dflash: arch dflash, tensors fc, taps [1, 12, 23, 35, 46, 57] (from 0), block 16, mask token 4, \
         layers [causal/2048 causal/2048 causal/2048 causal/2048 full], rope base 10000000, \
         embedding target's, head target's"
    );
}

#[test]
fn what_changes_nothing_is_accepted() {
    check(upstream().set("dflash.rope.dimension_sections", vec![7i32, 0, 0, 0]), &upstream());
    check(upstream().set("dflash.rope.scaling.type", "none"), &upstream());
    check(
        upstream().set("dflash.final_logit_softcapping", 0.0f32).set("dflash.logit_scale", 1.0f32),
        &upstream(),
    );
    // Here a flag for causality counts, and says what the pattern says only where all layers agree.
    let full = upstream().set("dflash.attention.sliding_window_pattern", vec![false; 3]);
    check(full.clone().set("dflash.attention.causal", false), &full);
}

/// A window that nothing has left yet is no window.
#[test]
fn a_window_beyond_the_history_is_none() {
    let parts = upstream().set("dflash.attention.causal", false);
    let wide = parts.clone().set("dflash.attention.sliding_window", 81u32);
    let none =
        parts.unset("dflash.attention.sliding_window").unset("dflash.attention.sliding_window_pattern");
    check(wide, &none);
}

#[test]
fn a_copy_of_the_targets_ends_drafts_as_the_target_does() {
    let copy = |name: &str| Parts::of(&Target::golden().file).tensor(name).clone();
    let own = upstream().with(copy("token_embd.weight")).with(copy("output.weight"));
    check(own.clone(), &upstream());
    let line = Rig::of("dflash", &own).drafter.contract();
    assert!(line.ends_with("embedding own, head own"), "{line}");
    let other = own.edit("token_embd.weight", |values| values.reverse());
    assert_ne!(drafts(&other), drafts(&upstream()), "the file's embedding is used");
}

fn d2t(tokens: &[usize]) -> Tensor {
    let data = tokens.iter().flat_map(|&t| (t as i64).to_le_bytes()).collect();
    Tensor { name: "d2t".into(), shape: vec![tokens.len() as u64], ty: GgmlType::I64, data }
}

/// A head for `tokens` alone, in their order.
fn reduced(tokens: &[usize]) -> Parts {
    let head = Parts::of(&Target::golden().file).tensor("output.weight").clone();
    let (values, width) = (head.values(), head.shape[0] as usize);
    let rows: Vec<f32> = tokens.iter().flat_map(|&t| values[t * width..(t + 1) * width].to_vec()).collect();
    upstream()
        .with(Tensor::f32("output.weight", &[width as u64, tokens.len() as u64], &rows))
        .with(d2t(tokens))
}

#[test]
fn a_reduced_vocabulary_is_the_full_one_without_the_rest() {
    let shuffled = |n: usize| (0..n).map(|i| (i * 37 + 11) % N_VOCAB).collect::<Vec<usize>>();
    check(reduced(&shuffled(N_VOCAB)), &upstream());

    let kept = shuffled(60);
    let mut rig = Rig::of("dflash", &reduced(&kept));
    assert!(rig.drafter.contract().ends_with("head own, 60 tokens"), "{}", rig.drafter.contract());
    let mut n_moved = 0;
    for point in rig.points() {
        let full = rig.reference(point);
        let mut left = full.clone();
        for row in &mut left {
            (0..N_VOCAB).filter(|t| !kept.contains(t)).for_each(|t| row[t] = f32::NEG_INFINITY);
        }
        let got = rig.draft_at(point.n, point.anchor);
        assert!(agrees(&got, &left), "{point:?}: {got:?}");
        n_moved +=
            full.iter().zip(&left).filter(|(full, left)| likeliest(full).0 != likeliest(left).0).count();
    }
    assert!(n_moved > 5, "only {n_moved} rows would have had a token that is not there");
}

#[test]
fn biases_and_sinks_are_applied() {
    let plus = |parts: Parts, part: &str, len: usize, value: f32| {
        (0..3).fold(parts, |parts, il| {
            parts.with(Tensor::f32(&format!("blk.{il}.attn_{part}"), &[len as u64], &vec![value; len]))
        })
    };
    for (part, len, none) in [
        ("q.bias", 84, 0.0),
        ("k.bias", 28, 0.0),
        ("v.bias", 28, 0.0),
        ("output.bias", 40, 0.0),
        ("sinks.weight", 6, -1e30),
    ] {
        check(plus(upstream(), part, len, none), &upstream());
        let other = drafts(&plus(upstream(), part, len, 0.5));
        assert_ne!(other, drafts(&upstream()), "{part} is used");
        assert!(other.iter().flat_map(|d| &d.q).all(|q| q.is_finite()));
    }
}

/// A backend that remembers which tensors were given to it.
struct Listing(CpuBackend, Mutex<Vec<String>>);

impl Backend for Listing {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn describe(&self) -> String {
        self.0.describe()
    }

    fn upload(&self, source: &WeightSource) -> Result<WeightId, Error> {
        self.1.lock().unwrap().push(source.file.tensors()[source.tensor].name.clone());
        self.0.upload(source)
    }

    fn alloc_states(&self, decls: &[StateDecl], config: StateConfig) -> Result<Arc<dyn States>, Error> {
        self.0.alloc_states(decls, config)
    }

    fn compile(&self, plan: Arc<Plan>, states: &Arc<dyn States>) -> Result<Box<dyn Exec>, Error> {
        self.0.compile(plan, states)
    }

    fn work(&self, plan: &Plan) -> PlanWork {
        self.0.work(plan)
    }
}

#[test]
fn the_targets_ends_are_shared_not_copied() {
    let listing = Arc::new(Listing(CpuBackend::new(1).unwrap(), Mutex::default()));
    let backend: Arc<dyn Backend> = listing.clone();
    let target = paceline_models::load(&Target::golden().file, &backend).unwrap();
    let of_target = listing.1.lock().unwrap().len();
    let parts = upstream();
    let request = LoadDrafter {
        file: parts.file(),
        backend: &backend,
        target: &*target,
        states: STATES,
        n_cell_max: 4096,
        n_draft_max: None,
    };
    let drafter = load(&request).unwrap();
    let mut uploaded = listing.1.lock().unwrap()[of_target..].to_vec();
    let mut names: Vec<String> = parts.tensors.iter().map(|t| t.name.clone()).collect();
    uploaded.sort();
    names.sort();
    assert_eq!(uploaded, names, "each tensor of the drafter once, and none of the target's");
    assert_eq!(names.len(), 3 + 11 * 3);
    assert_eq!(Rig::with("dflash", drafter).red(), GREEN);
}
