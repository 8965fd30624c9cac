//! The bundled target: logits of a position are the same bits however rows share forwards, at every width that a verify can have, on
//! every instruction set of this machine, at any number of threads and with every type of KV cells.

use std::path::PathBuf;
use std::sync::Arc;

use paceline_backend::{Backend, Exec, KvType, PlanBuilder, StateConfig, Step, StepOut, cpu::CpuBackend};
use paceline_gguf::Gguf;
use paceline_kernels::KernelTable;
use paceline_memory::{Memory, SeqId};

const N: usize = 40;

struct Rig {
    exec: Box<dyn Exec>,
    memory: Memory,
    out: StepOut,
}

impl Rig {
    fn new(isa: &str, n_threads: usize, kv: KvType) -> Rig {
        let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/bundled/target.gguf");
        let file = Arc::new(Gguf::open(&file).unwrap());
        let backend = CpuBackend::new(n_threads).unwrap().with_isa(isa).unwrap();
        let backend: Arc<dyn Backend> = Arc::new(backend);
        let model = paceline_models::load(&file, &backend).unwrap();
        let mut p = PlanBuilder::new(&[]);
        let logits = model.record(&mut p);
        let config = StateConfig { page_len: 16, kv: kv.into(), n_tentative_max: 32 };
        let states = backend.alloc_states(model.states(), config).unwrap();
        let exec = backend.compile(Arc::new(p.finish(Some(logits))), &states).unwrap();
        Rig { exec, memory: Memory::new(states, 4 * N), out: StepOut::default() }
    }

    /// One forward of `n` rows of each sequence, the first certain and all kept; their logits, sequence by sequence.
    fn forward(&mut self, seqs: &[SeqId], n: usize) -> Vec<Vec<u32>> {
        let past = self.memory.len(seqs[0]);
        for &seq in seqs {
            self.memory.prepare(seq, n, 1).unwrap();
        }
        let rows = || seqs.iter().flat_map(|_| past..past + n);
        let tokens: Vec<u32> = rows().map(|i| 40 + (i * 97 % 3000) as u32).collect();
        let positions: Vec<u32> = rows().map(|i| i as u32).collect();
        let outputs: Vec<u32> = (0..tokens.len() as u32).collect();
        let lanes: Vec<_> = seqs.iter().enumerate().map(|(i, &seq)| self.memory.lane(seq, i * n)).collect();
        let step =
            Step { tokens: &tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &outputs };
        self.exec.run(&step, &mut self.out);
        drop(lanes);
        seqs.iter().for_each(|&seq| self.memory.commit(seq, n));
        let bits = |i: usize| self.out.output_row(i).iter().map(|x| x.to_bits()).collect();
        (0..tokens.len()).map(bits).collect()
    }

    /// All positions in forwards of these widths, repeated until there are enough.
    fn all(&mut self, widths: &[usize]) -> Vec<Vec<u32>> {
        let seq = self.memory.create();
        let mut logits = Vec::new();
        for &n in widths.iter().cycle() {
            let n = n.min(N - logits.len());
            if n == 0 {
                break;
            }
            logits.extend(self.forward(&[seq], n));
        }
        self.memory.free(seq);
        logits
    }
}

#[test]
fn every_width_gives_the_same_bits() {
    for table in KernelTable::available() {
        for kv in [KvType::F16, KvType::Q8_0] {
            let mut rig = Rig::new(table.isa, 2, kv);
            let alone = rig.all(&[1]);
            assert_eq!(alone.len(), N);
            // The scalar kernels are the definition, and slow.
            let widths: Vec<usize> = if table.isa == "scalar" { vec![7] } else { (2..=32).collect() };
            for n in widths {
                assert!(rig.all(&[n]) == alone, "{} {kv}: forwards of {n} rows", table.isa);
                assert!(rig.all(&[1, n, 3]) == alone, "{} {kv}: forwards of 1, {n} and 3 rows", table.isa);
            }
            assert!(Rig::new(table.isa, 1, kv).all(&[5]) == alone, "{} {kv}: one thread", table.isa);
            if table.isa != "scalar" {
                for n_slot in [2, 5, 8] {
                    let seqs: Vec<SeqId> = (0..n_slot).map(|_| rig.memory.create()).collect();
                    let logits = rig.forward(&seqs, 4);
                    for (slot, logits) in logits.chunks(4).enumerate() {
                        assert!(logits == &alone[..4], "{} {kv}: slot {slot} of {n_slot}", table.isa);
                    }
                    seqs.iter().for_each(|&seq| rig.memory.free(seq));
                }
            }
        }
    }
}
