//! What a sequence remembers: KV pages, recurrent state, tentative rows and commit
