//! Test support: tiny models built in memory, the hash model, scripted drafters, closeness
