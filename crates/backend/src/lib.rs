//! The recorded plan of a forward, the backend interface, and the CPU backend
