//! llama.cpp behind [`Engine`]: the only file with `unsafe`.
//!
//! Contexts are made as llama.cpp makes them by default (mapped file, f16 KV, flash attention on auto), except for the
//! sizes. Weights are loaded twice, once for each of its two layouts: *repacked* (the default: rows of some types
//! interleaved at load) and *plain* (`use_extra_bufts` off), because neither is faster everywhere.
//!
//! DFlash needs functions of llama.cpp's staging header (`llama-ext.h`), which the bindings do not list; they are linked by
//! their C++ names at the end of this file.

use std::{
    ffi::{CStr, CString, c_char, c_void},
    path::Path,
    ptr::NonNull,
    rc::Rc,
    slice,
    sync::Once,
};

use anyhow::{Context, Result, bail, ensure};
use llama_cpp_sys_2 as sys;

use crate::engine::{Engine, Keep, Outputs, Settings, Token};

/// Version of the bindings, pinned in the manifest.
pub const CRATE: &str = "llama-cpp-sys-2 0.1.161";

/// How weights lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Rows interleaved at load where llama.cpp has a form for it.
    Repacked,
    /// As in the file, mapped.
    Plain,
}

impl Layout {
    /// What tables call llama.cpp with it.
    fn engine_name(self) -> &'static str {
        match self {
            Layout::Repacked => "llama.cpp",
            Layout::Plain => "llama.cpp-nr",
        }
    }
}

/// llama.cpp's version, and what it says of the instructions it was built for.
pub fn version() -> (String, String) {
    start();
    // SAFETY: both return strings that live as long as the program.
    let (version, system) = unsafe { (sys::llama_version(), sys::llama_print_system_info()) };
    (text(version), text(system))
}

/// Fails if this machine has instructions that llama.cpp's kernels use and this build of them lacks: its figures would
/// be worth nothing.
pub fn check_build(isa: &[String]) -> Result<()> {
    let (_, system) = version();
    if let Some(word) = missing(isa, &system) {
        bail!(
            "llama.cpp was built without {word}, which this machine has: {system}\n\
             hint: build inside peers/, whose .cargo/config.toml asks for it, after `cargo clean -p llama-cpp-sys-2`"
        );
    }
    Ok(())
}

/// The first instruction set that is in `isa`, as Linux names them, and not in llama.cpp's `system` info.
fn missing(isa: &[String], system: &str) -> Option<&'static str> {
    const WORDS: [(&str, &str); 3] =
        [("avx2", "AVX2"), ("avx512_vnni", "AVX512_VNNI"), ("avx512_bf16", "AVX512_BF16")];
    let is_missing = |(flag, word): &&(&str, &str)| {
        isa.iter().any(|has| has == flag) && !system.contains(&format!("{word} = 1"))
    };
    WORDS.iter().find(is_missing).map(|(_, word)| *word)
}

/// Once: devices are looked up, and only errors are logged.
fn start() {
    static START: Once = Once::new();
    extern "C" fn log(level: sys::ggml_log_level, words: *const c_char, _: *mut c_void) {
        if level == sys::GGML_LOG_LEVEL_ERROR {
            eprint!("llama.cpp: {}", text(words));
        }
    }
    START.call_once(|| {
        // SAFETY: called once, before anything else of the library; `log` keeps no pointer.
        unsafe {
            sys::llama_log_set(Some(log), std::ptr::null_mut());
            sys::llama_backend_init();
        }
    });
}

/// A C string of the library as a Rust one.
fn text(words: *const c_char) -> String {
    // SAFETY: the library's strings end with a zero and outlive this call.
    unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
}

/// Loaded weights, shared by contexts.
pub struct Model {
    ptr: NonNull<sys::llama_model>,
    layout: Layout,
    n_vocab: usize,
}

impl Model {
    /// Loads `path`.
    pub fn load(path: &Path, layout: Layout) -> Result<Rc<Model>> {
        start();
        let name = CString::new(path.as_os_str().as_encoded_bytes())?;
        // SAFETY: the name is a C string that outlives the call; the parameters are the library's own but for two values.
        let ptr = unsafe {
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = 0;
            params.use_extra_bufts = layout == Layout::Repacked;
            sys::llama_model_load_from_file(name.as_ptr(), params)
        };
        let ptr =
            NonNull::new(ptr).with_context(|| format!("{}: llama.cpp can't load it", path.display()))?;
        // SAFETY: the model is alive.
        let n_vocab = unsafe { sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(ptr.as_ptr())) } as usize;
        Ok(Rc::new(Model { ptr, layout, n_vocab }))
    }

    /// The tokens that llama.cpp makes of `words`, with BOS where the model wants one.
    pub fn tokenize(&self, words: &str) -> Result<Vec<Token>> {
        let mut tokens = vec![0; words.len() + 8];
        // SAFETY: both buffers are as long as the call is told.
        let n = unsafe {
            sys::llama_tokenize(
                sys::llama_model_get_vocab(self.ptr.as_ptr()),
                words.as_ptr().cast(),
                i32::try_from(words.len())?,
                tokens.as_mut_ptr(),
                i32::try_from(tokens.len())?,
                true,
                false,
            )
        };
        ensure!(n >= 0, "llama.cpp can't tokenize {} bytes of text", words.len());
        Ok(tokens[..n as usize].iter().map(|&token| token as Token).collect())
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: contexts hold an `Rc` of it, so none is left.
        unsafe { sys::llama_model_free(self.ptr.as_ptr()) };
    }
}

/// A context: one model, some sequences.
pub struct Llama {
    model: Rc<Model>,
    ctx: NonNull<sys::llama_context>,
    /// Rows behind each sequence.
    lens: Vec<usize>,
    batch: Batch,
    /// Rows of the last batch that have logits.
    outputs: Vec<i32>,
}

/// The arrays behind a `llama_batch`.
#[derive(Default)]
struct Batch {
    tokens: Vec<sys::llama_token>,
    positions: Vec<sys::llama_pos>,
    n_seq: Vec<i32>,
    seqs: Vec<sys::llama_seq_id>,
    seq_ptrs: Vec<*mut sys::llama_seq_id>,
    logits: Vec<i8>,
}

impl Batch {
    fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.n_seq.clear();
        self.seqs.clear();
        self.seq_ptrs.clear();
        self.logits.clear();
    }

    fn push(&mut self, token: Token, position: usize, seq: usize, logits: bool) {
        self.tokens.push(token as i32);
        self.positions.push(position as i32);
        self.n_seq.push(1);
        self.seqs.push(seq as i32);
        self.logits.push(logits.into());
    }

    /// Pointers into this; good until the next push.
    fn raw(&mut self) -> sys::llama_batch {
        self.seq_ptrs.clear();
        self.seq_ptrs.extend(self.seqs.iter_mut().map(std::ptr::from_mut));
        sys::llama_batch {
            n_tokens: self.tokens.len() as i32,
            token: self.tokens.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: self.positions.as_mut_ptr(),
            n_seq_id: self.n_seq.as_mut_ptr(),
            seq_id: self.seq_ptrs.as_mut_ptr(),
            logits: self.logits.as_mut_ptr(),
        }
    }
}

impl Llama {
    /// A context over `model`.
    pub fn new(model: &Rc<Model>, settings: &Settings) -> Result<Llama> {
        Llama::with_other(model, settings, std::ptr::null_mut())
    }

    /// A context that borrows embedding and head from the model of `other`, if that is not null.
    fn with_other(model: &Rc<Model>, s: &Settings, other: *mut sys::llama_context) -> Result<Llama> {
        // SAFETY: the model is alive, and so is `other`, which the caller keeps.
        let ctx = unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = u32::try_from(s.n_ctx * s.n_seq)?;
            params.n_batch = u32::try_from(s.n_ubatch)?;
            params.n_ubatch = u32::try_from(s.n_ubatch)?;
            params.n_seq_max = u32::try_from(s.n_seq)?;
            params.n_threads = i32::try_from(s.n_threads)?;
            params.n_threads_batch = params.n_threads;
            // Only recurrent models need snapshots to take rows back, and they cost; others clamp it to 0 anyway.
            if sys::llama_model_is_hybrid(model.ptr.as_ptr())
                || sys::llama_model_is_recurrent(model.ptr.as_ptr())
            {
                params.n_rs_seq = u32::try_from(s.n_tentative)?;
            }
            params.ctx_other = other;
            sys::llama_init_from_model(model.ptr.as_ptr(), params)
        };
        let ctx = NonNull::new(ctx).context("llama.cpp can't make a context")?;
        Ok(Llama {
            model: model.clone(),
            ctx,
            lens: vec![0; s.n_seq],
            batch: Batch::default(),
            outputs: Vec::new(),
        })
    }

    /// Takes rows of sequence `seq` from `len` on out of memory.
    fn truncate(&mut self, seq: usize, len: usize) -> Result<()> {
        // SAFETY: the context is alive, and nothing runs in it.
        let done = unsafe {
            let memory = sys::llama_get_memory(self.ctx.as_ptr());
            sys::llama_memory_seq_rm(memory, seq as i32, len as i32, -1)
        };
        ensure!(done, "llama.cpp can't take back rows of sequence {seq} from {len} on");
        self.lens[seq] = len;
        Ok(())
    }
}

impl Engine for Llama {
    fn name(&self) -> &str {
        self.model.layout.engine_name()
    }

    fn n_vocab(&self) -> usize {
        self.model.n_vocab
    }

    fn forward(&mut self, tokens: &[&[Token]], outputs: Outputs, keep: Keep) -> Result<()> {
        self.batch.clear();
        self.outputs.clear();
        for (seq, tokens) in tokens.iter().enumerate() {
            for (i, &token) in tokens.iter().enumerate() {
                let wanted = match outputs {
                    Outputs::None => false,
                    Outputs::Last => i + 1 == tokens.len(),
                    Outputs::All => true,
                };
                if wanted {
                    self.outputs.push(self.batch.tokens.len() as i32);
                }
                self.batch.push(token, self.lens[seq] + i, seq, wanted);
            }
        }
        // SAFETY: the arrays live in `self.batch`, which nothing touches during the call.
        let failed = unsafe {
            let failed = sys::llama_decode(self.ctx.as_ptr(), self.batch.raw());
            sys::llama_synchronize(self.ctx.as_ptr());
            failed
        };
        if failed != 0 {
            bail!("llama_decode of {} rows: {failed}", self.batch.tokens.len());
        }
        for (seq, tokens) in tokens.iter().enumerate() {
            match keep {
                Keep::Rows => self.lens[seq] += tokens.len(),
                Keep::Nothing => self.truncate(seq, self.lens[seq])?,
            }
        }
        Ok(())
    }

    fn logits(&self, i: usize) -> &[f32] {
        // SAFETY: a row of `n_vocab` floats in the context's own buffer, which the next forward (`&mut self`) rewrites.
        unsafe {
            let row = sys::llama_get_logits_ith(self.ctx.as_ptr(), self.outputs[i]);
            assert!(!row.is_null(), "llama.cpp has no logits of row {i}");
            slice::from_raw_parts(row, self.model.n_vocab)
        }
    }

    fn reset(&mut self) -> Result<()> {
        // SAFETY: the context is alive, and nothing runs in it.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.ctx.as_ptr()), false) };
        self.lens.fill(0);
        Ok(())
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        // SAFETY: nobody else has the context; a drafter's is dropped before its target's (field order below).
        unsafe { sys::llama_free(self.ctx.as_ptr()) };
    }
}

/// A target and its DFlash drafter, driven the way llama.cpp's own `common_speculative` drives them.
pub struct LlamaDflash {
    /// Dropped first: it borrows from the target.
    drafter: Llama,
    /// The target, whose layer inputs are kept for the drafter.
    pub target: Llama,
    /// Layers whose inputs the drafter reads.
    taps: Vec<u32>,
    n_embd: usize,
    mask: Token,
    n_block: usize,
    /// Rows for the drafter, `[n, taps · n_embd]`.
    features: Vec<f32>,
    batch: NonNull<sys::llama_batch_ext>,
}

impl LlamaDflash {
    /// Loads the drafter for the context `target`.
    pub fn new(target: Llama, path: &Path, settings: &Settings) -> Result<LlamaDflash> {
        let model = Model::load(path, target.model.layout)?;
        let drafter = Llama::with_other(&model, settings, target.ctx.as_ptr())
            .with_context(|| format!("{}: as a drafter", path.display()))?;
        let (target_model, model) = (target.model.ptr.as_ptr(), model.ptr.as_ptr());
        // SAFETY: models and contexts are alive; the layer ids are an array of the length that the model gives.
        unsafe {
            let n_taps = llama_model_target_layer_ids_n(model) as usize;
            let ids = llama_model_target_layer_ids(model);
            ensure!(n_taps > 0 && !ids.is_null(), "{}: names no target layers", path.display());
            let taps: Vec<u32> = slice::from_raw_parts(ids, n_taps).iter().map(|&id| id as u32).collect();
            for &tap in &taps {
                llama_set_embeddings_layer_inp(target.ctx.as_ptr(), tap, true);
            }
            // A block attends in both directions.
            sys::llama_set_causal_attn(drafter.ctx.as_ptr(), false);
            let mut value = [0 as c_char; 32];
            let found = sys::llama_model_meta_val_str(
                model,
                c"dflash.block_size".as_ptr(),
                value.as_mut_ptr(),
                value.len(),
            );
            let n_block = if found >= 0 { text(value.as_ptr()).parse()? } else { 16 };
            let mask = sys::llama_vocab_mask(sys::llama_model_get_vocab(model));
            ensure!(mask >= 0, "{}: names no mask token", path.display());
            let batch = NonNull::new(sys::llama_batch_ext_init(drafter.ctx.as_ptr())).context("a batch")?;
            let n_embd = sys::llama_model_n_embd(target_model) as usize;
            let mask = mask as Token;
            Ok(LlamaDflash { drafter, target, taps, n_embd, mask, n_block, features: Vec::new(), batch })
        }
    }

    /// Rows of a block.
    pub fn n_block(&self) -> usize {
        self.n_block
    }

    /// Gives the drafter the features of the target's last forward, whose first row was at `first_position`; llama.cpp
    /// does so for every row of it, accepted or not.
    pub fn absorb(&mut self, first_position: usize, n_rows: usize) -> Result<()> {
        let width = self.taps.len() * self.n_embd;
        self.features.resize(n_rows * width, 0.0);
        for (k, &tap) in self.taps.iter().enumerate() {
            // SAFETY: the target keeps `n_rows` rows of this layer's input until its next forward.
            let layer = unsafe {
                let layer = llama_get_embeddings_layer_inp(self.target.ctx.as_ptr(), tap);
                ensure!(!layer.is_null(), "the input of layer {tap} was not kept");
                slice::from_raw_parts(layer, n_rows * self.n_embd)
            };
            let to =
                self.features.chunks_exact_mut(width).map(|row| &mut row[k * self.n_embd..][..self.n_embd]);
            to.zip(layer.chunks_exact(self.n_embd)).for_each(|(to, from)| to.copy_from_slice(from));
        }
        let batch = self.batch.as_ptr();
        // SAFETY: the batch copies or reads the rows before `features` changes; four positions, as M-RoPE would read.
        let failed = unsafe {
            sys::llama_batch_ext_clear(batch);
            for (i, row) in self.features.chunks_exact(width).enumerate() {
                let row = sys::llama_embd { data: row.as_ptr(), n_rows: 1, n_embd: width };
                let at = sys::llama_batch_ext_add_embd(batch, 0, row);
                ensure!(at >= 0, "llama.cpp refused a row of features: {at}");
                let position = (first_position + i) as i32;
                sys::llama_batch_ext_set_pos(batch, at, [position, position, position, 0].as_ptr());
                sys::llama_batch_ext_set_output_logits(batch, at, false);
            }
            let failed = sys::llama_process(self.drafter.ctx.as_ptr(), sys::LLAMA_PROCESS_TYPE_DECODE, batch);
            sys::llama_synchronize(self.drafter.ctx.as_ptr());
            failed
        };
        ensure!(failed == 0, "llama.cpp's drafter did not take {n_rows} rows: {failed}");
        self.drafter.lens[0] = first_position + n_rows;
        Ok(())
    }

    /// Fills one block behind `anchor`, which is at `position`, and takes the likeliest token of each masked row.
    pub fn draft(&mut self, anchor: Token, position: usize) -> Result<Vec<Token>> {
        self.drafter.truncate(0, position)?;
        let mut block = vec![self.mask; self.n_block];
        block[0] = anchor;
        // All rows have logits, the anchor's too: that is what llama.cpp asks for.
        self.drafter.forward(&[&block], Outputs::All, Keep::Nothing)?;
        Ok((1..self.n_block).map(|i| argmax(self.drafter.logits(i))).collect())
    }

    /// Ends a cycle: both forget what they have from `len` on.
    pub fn keep(&mut self, len: usize) -> Result<()> {
        self.target.truncate(0, len)?;
        self.drafter.truncate(0, len)
    }
}

impl Drop for LlamaDflash {
    fn drop(&mut self) {
        // SAFETY: nobody else has the batch, and its context is still alive.
        unsafe { sys::llama_batch_ext_free(self.batch.as_ptr()) };
    }
}

/// The likeliest token, the first of several.
pub fn argmax(logits: &[f32]) -> Token {
    let best = logits.iter().enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map_or(0, |(token, _)| token as Token)
}

// C++ functions of `llama-ext.h`, by their names in the ABI that GCC and Clang share.
unsafe extern "C" {
    #[link_name = "_Z30llama_set_embeddings_layer_inpP13llama_contextjb"]
    fn llama_set_embeddings_layer_inp(ctx: *mut sys::llama_context, layer: u32, value: bool);
    #[link_name = "_Z30llama_get_embeddings_layer_inpP13llama_contextj"]
    fn llama_get_embeddings_layer_inp(ctx: *mut sys::llama_context, layer: u32) -> *mut f32;
    #[link_name = "_Z28llama_model_target_layer_idsPK11llama_model"]
    fn llama_model_target_layer_ids(model: *const sys::llama_model) -> *const i32;
    #[link_name = "_Z30llama_model_target_layer_ids_nPK11llama_model"]
    fn llama_model_target_layer_ids_n(model: *const sys::llama_model) -> u32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_the_instructions_of_the_machine_is_noticed() {
        let isa = ["fma", "avx2", "avx512_vnni"].map(String::from);
        assert_eq!(missing(&isa, "CPU : AVX2 = 1 | FMA = 1 | "), Some("AVX512_VNNI"));
        assert_eq!(missing(&isa, "CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1 | "), None);
        assert_eq!(missing(&isa[..2], "CPU : AVX2 = 1 | "), None);
    }

    #[test]
    fn the_first_of_the_likeliest() {
        assert_eq!(argmax(&[0.0, 2.0, -1.0, 2.0]), 1);
    }
}
