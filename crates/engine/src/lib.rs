//! Slots, the plan of a step, and step()
