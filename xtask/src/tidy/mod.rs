pub(crate) fn run(_: &crate::Workspace) -> anyhow::Result<()> {
    Ok(())
}
