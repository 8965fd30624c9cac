//! Target architectures, each a page that records its forward
