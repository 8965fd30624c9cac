//! The DFlash drafter against its reference: block logits at several points of a sequence, and drafts that do not
//! depend on who else drafts, how the context arrived, or what was drafted before.

use std::sync::Arc;

use paceline_backend::{Backend, KvType, StateConfig, cpu::CpuBackend};
use paceline_convert::{ConvertOptions, convert};
use paceline_gguf::Gguf;
use paceline_memory::Memory;
use paceline_models::Model;
use paceline_sampling::{Sampler, SamplingParams};
use paceline_spec::{DraftRequest, Drafter, Kept, LoadDrafter, SeqId, load};
use paceline_testkit::{Golden, goldens_dir};

/// Block size of the golden drafter.
const BLOCK: usize = 6;

struct Rig {
    drafter: Box<dyn Drafter>,
    golden: Golden,
    width: usize,
    ids: Memory,
}

fn target(backend: &Arc<dyn Backend>, dir: &std::path::Path) -> Box<dyn Model> {
    let out = dir.join("target.gguf");
    convert(&ConvertOptions::new(goldens_dir().join("qwen35"), &out), |_| {}).unwrap();
    paceline_models::load(&Arc::new(Gguf::open(&out).unwrap()), backend).unwrap()
}

impl Rig {
    fn new(name: &str) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1).unwrap());
        let target = target(&backend, dir.path());
        let out = dir.path().join("drafter.gguf");
        let options = ConvertOptions {
            target_dir: Some(goldens_dir().join("qwen35")),
            ..ConvertOptions::new(goldens_dir().join(name), &out)
        };
        convert(&options, |_| {}).unwrap();
        let states = StateConfig { page_len: 16, kv_type: KvType::F32, n_tentative_max: 16 };
        let file = Arc::new(Gguf::open(&out).unwrap());
        let request = LoadDrafter { file, backend: &backend, target: &*target, states, n_cell_max: 4096 };
        let drafter = load(&request).unwrap();
        let golden = Golden::open(name);
        let width = golden.shape("features")[1];
        // Sequence ids come from a memory; this one only hands them out.
        let ids = Memory::new(backend.alloc_states(&[], states).unwrap(), 0);
        Rig { drafter, golden, width, ids }
    }

    /// A sequence whose first `n` tokens were committed in chunks of `chunk`.
    fn sequence(&mut self, n: usize, chunk: usize) -> SeqId {
        let (tokens, features) = (self.golden.tokens(), self.golden.f32("features"));
        let seq = self.ids.create();
        for first in (0..n).step_by(chunk) {
            let end = n.min(first + chunk);
            self.drafter.commit(&[Kept {
                seq,
                first_position: first,
                tokens: &tokens[first..end],
                taps: &features[first * self.width..end * self.width],
            }]);
        }
        seq
    }

    /// Points of the golden: committed tokens, anchor.
    fn points(&self) -> Vec<(usize, u32, usize)> {
        self.golden.i32("points").chunks(3).map(|p| (p[0] as usize, p[1] as u32, p[2] as usize)).collect()
    }
}

fn greedy() -> Sampler {
    let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    Sampler::new(params, 131, Arc::default()).unwrap()
}

fn draft(drafter: &mut dyn Drafter, asked: &[(SeqId, usize, u32)], n_max: usize) -> Vec<paceline_spec::Draft> {
    let mut samplers: Vec<Sampler> = asked.iter().map(|_| greedy()).collect();
    let mut requests: Vec<DraftRequest<'_>> = asked
        .iter()
        .zip(&mut samplers)
        .map(|(&(seq, position, anchor), sampler)| DraftRequest { seq, anchor, position, n_max, sampler })
        .collect();
    drafter.draft(&mut requests)
}

/// The reference's greedy tokens of a point, with the log of their probability.
fn reference(golden: &Golden, point: usize) -> Vec<(u32, f32)> {
    let name = format!("point.{point}.logits");
    let n_vocab = golden.shape(&name)[1];
    golden
        .f32(&name)
        .chunks_exact(n_vocab)
        .skip(1)
        .map(|row| {
            let (token, max) = row.iter().enumerate().fold((0, f32::MIN), |m, (i, &x)| if x > m.1 { (i, x) } else { m });
            let sum: f32 = row.iter().map(|x| (x - max).exp()).sum();
            (token as u32, -sum.ln())
        })
        .collect()
}

fn check(name: &str) {
    let mut rig = Rig::new(name);
    let points = rig.points();
    let mut n_checked = 0;
    for (p, &(n, anchor, n_row)) in points.iter().enumerate() {
        // The reference has some shorter blocks too; here a block has its native size.
        if n_row != BLOCK || n == 0 {
            continue;
        }
        n_checked += 1;
        let seq = rig.sequence(n, 75);
        let got = &draft(&mut *rig.drafter, &[(seq, n, anchor)], BLOCK - 1)[0];
        assert_eq!(got.fault, None);
        let want = reference(&rig.golden, p);
        let tokens: Vec<u32> = want.iter().map(|w| w.0).collect();
        assert_eq!(got.tokens, tokens, "{name} point {p}");
        for (i, (q, (_, log_q))) in got.q.iter().zip(&want).enumerate() {
            // The probability of the likeliest token hangs on every logit of its row.
            assert!((q.ln() - log_q).abs() < 5e-4, "{name} point {p} row {}: {} != {log_q}", i + 1, q.ln());
        }
        check_equalities(&mut rig, n, anchor, got);
    }
    assert!(n_checked >= 5, "only {n_checked} points were comparable");
}

fn check_equalities(rig: &mut Rig, n: usize, anchor: u32, want: &paceline_spec::Draft) {
    for chunk in [1, 3, 16] {
        let seq = rig.sequence(n, chunk);
        // Twice: a draft leaves nothing behind.
        for _ in 0..2 {
            assert_eq!(&draft(&mut *rig.drafter, &[(seq, n, anchor)], BLOCK - 1)[0], want, "chunks of {chunk}");
        }
        rig.drafter.forget(seq);
    }
    // A shorter draft is the beginning of a longer one.
    let seq = rig.sequence(n, 75);
    let short = &draft(&mut *rig.drafter, &[(seq, n, anchor)], 2)[0];
    assert_eq!(short.tokens, want.tokens[..2]);
    // Among others, at any place of the batch.
    let (a, b) = (rig.sequence(5, 75), rig.sequence(40, 7));
    for order in [[(seq, n, anchor), (a, 5, 3), (b, 40, 9)], [(a, 5, 3), (b, 40, 9), (seq, n, anchor)]] {
        let drafts = draft(&mut *rig.drafter, &order, BLOCK - 1);
        let at = order.iter().position(|r| r.0 == seq).unwrap();
        assert_eq!(&drafts[at], want, "among others");
    }
    for seq in [seq, a, b] {
        rig.drafter.forget(seq);
    }
}

#[test]
fn sliding_causal_and_full_layers() {
    check("dflash");
}

#[test]
fn sliding_layers_that_see_the_whole_block() {
    check("dflash-noncausal");
}

#[test]
fn nothing_is_held_for_forgotten_sequences() {
    let mut rig = Rig::new("dflash");
    let seq = rig.sequence(40, 9);
    assert!(rig.drafter.state_bytes() > 0);
    rig.drafter.forget(seq);
    assert_eq!(rig.drafter.state_bytes(), 0);
}

#[test]
fn a_gap_in_its_memory_is_said_not_drafted_over() {
    let mut rig = Rig::new("dflash");
    let seq = rig.sequence(10, 75);
    let unknown = rig.ids.create();
    let drafts = draft(&mut *rig.drafter, &[(seq, 12, 3), (unknown, 12, 3)], 3);
    assert!(drafts.iter().all(|d| d.tokens.is_empty()));
    assert_eq!(drafts[0].fault.as_deref(), Some("its memory has 10 of 12 committed tokens"));
    assert_eq!(drafts[1].fault.as_deref(), Some("it has no memory of this sequence"));
}
