//! The birth of a template backstage: with numbers that no program has.

use libc::pid_t;

use super::error::{MomentError, process};
use super::take::{END_PATIENCE, Ground};
use crate::deltacr::stop::Stopped;
use crate::deltacr::tasks::pid_inside;
use crate::deltacr::template::{Numbers, Outline, Request, Template, TemplateError, TemplateRefusal};
use crate::sandbox::reserve::{Opened, PROGRAMS_END, Pair};

/// A template of a stopped process, and its number inside. `chooses`: the process has the right to choose numbers.
pub(super) fn make_template(
    stopped: &mut Stopped,
    ground: &Ground<'_>,
    numbers: &Opened<'_>,
    pid: pid_t,
    chooses: bool,
) -> Result<(Template, Outline, pid_t), MomentError> {
    let mut pair = None;
    let made = loop {
        let freezer = ground.nursery.take()?;
        if chooses {
            pair = Some(if pair.is_none() { numbers.take() } else { numbers.take_another() });
        } else {
            // A helper and a template, and both again if that was not all.
            numbers.set_next(4).map_err(process("set the number for a template of", pid))?;
        }
        let chosen = pair.map(|Pair { first, second }| Numbers { helper: first, template: second });
        let request = Request { keeper: Some(ground.init), numbers: chosen, careful: false };
        match Template::make(stopped, pid, freezer, &request) {
            Err(TemplateError::Refused(TemplateRefusal::NumberTaken { .. })) if !numbers.is_exhausted() => {}
            other => break other,
        }
    };
    let (template, outline) = made?;
    let number = match pair {
        Some(pair) => pair.second,
        None => pid_inside(template.pid()).map_err(process("identify the template of", pid))?,
    };
    if number < PROGRAMS_END {
        // Somebody else has been made meanwhile.
        template.remove(END_PATIENCE)?;
        return Err(TemplateError::from(TemplateRefusal::NumberTaken { number }).into());
    }
    Ok((template, outline, number))
}
