//! Where an operation's time goes: a span per operation, cut into phases, and the histograms that they feed.
//!
//! While an operation runs nothing is allocated, formatted or locked: a [`Span`] is a few numbers on the stack.
//! When it has ended, [`Book::record`] takes it in.

mod book;
mod span;

pub use book::{Book, Row, Subject};
pub use span::{Operation, Phase, Span};
