use super::*;
pub struct Probe;
impl Probe {
    pub fn new(_: crate::finder::owners::Proc) -> Self {
        Probe
    }
}
impl Method for Probe {
    fn name(&self) -> MethodName {
        MethodName::Probe
    }
    fn act(&mut self, t: &[Target], _: &mut dyn Scene) -> Vec<Result<(), ActError>> {
        t.iter().map(|_| Err(ActError::PeerSilent)).collect()
    }
}
