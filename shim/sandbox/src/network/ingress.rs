//! What becomes of frames that arrive at the interfaces of a namespace: their ingress queues, and the filters that hang there
//! (tc(8)), ours and those of others.

use futures::TryStreamExt as _;
use rtnetlink::Handle;
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirrorOption, TcActionOption, TcAttribute, TcFilterU32, TcFilterU32Option,
    TcHandle, TcMessage, TcMirrorActionType, TcOption,
};

use super::NetworkError;

/// Kind of the queues that we make.
pub(super) const KIND: &str = "ingress";

/// The queue of an interface.
pub(super) struct Ingress {
    pub(super) link_index: u32,
    /// Whether it is of [`KIND`]. `clsact`, which takes the same place, is never ours: whoever makes one without
    /// filters is about to add some.
    is_plain: bool,
    filters: Vec<Filter>,
}

/// A message about filters.
#[derive(Debug, Eq, PartialEq)]
enum Filter {
    /// About no filter, but what such as ours are kept in.
    Table,
    /// Frames leave through an interface, which has the index 0 when it is gone.
    Redirect(u32),
    Other,
}

impl Ingress {
    /// Indices of interfaces that frames are sent to.
    pub(super) fn targets(&self) -> impl Iterator<Item = u32> {
        let target = |filter: &Filter| if let Filter::Redirect(target) = filter { Some(*target) } else { None };
        self.filters.iter().filter_map(target)
    }

    /// Whether nobody is served by it: it has no filters, or those of an owner that was killed.
    pub(super) fn is_left_behind(&self) -> bool {
        self.is_plain && self.filters.iter().all(|filter| matches!(filter, Filter::Table | Filter::Redirect(0)))
    }
}

/// Every such queue of the namespace.
pub(super) async fn read(handle: &Handle) -> Result<Vec<Ingress>, NetworkError> {
    let queues: Vec<TcMessage> = handle
        .qdisc()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(NetworkError::netlink("list the queues of the network namespace"))?;
    let mut found = Vec::new();
    for queue in queues.iter().filter(|queue| queue.header.parent == TcHandle::INGRESS) {
        let filters: Vec<TcMessage> = handle
            .traffic_filter(queue.header.index)
            .get()
            .ingress()
            .execute()
            .try_collect()
            .await
            .map_err(NetworkError::netlink("list the filters of the network namespace"))?;
        found.push(Ingress {
            link_index: queue.header.index.unsigned_abs(),
            is_plain: is_of_kind(queue, KIND),
            filters: filters.iter().map(filter).collect(),
        });
    }
    Ok(found)
}

fn is_of_kind(message: &TcMessage, kind: &str) -> bool {
    message.attributes.iter().any(|attribute| matches!(attribute, TcAttribute::Kind(found) if found == kind))
}

fn filter(message: &TcMessage) -> Filter {
    if !is_of_kind(message, TcFilterU32::KIND) {
        return Filter::Other;
    }
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options.as_slice()),
        _ => None,
    });
    let Some(options) = options else { return Filter::Table };
    let redirected = options.iter().find_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Divisor(_)) => Some(Filter::Table),
        TcOption::U32(TcFilterU32Option::Action(actions)) => target(actions).map(Filter::Redirect),
        _ => None,
    });
    redirected.unwrap_or(Filter::Other)
}

/// Where the first of the actions sends a frame.
fn target(actions: &[TcAction]) -> Option<u32> {
    let options = actions.first()?.attributes.iter().find_map(|attribute| match attribute {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    });
    options?.iter().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))
            if mirror.eaction == TcMirrorActionType::EgressRedir =>
        {
            Some(mirror.ifindex)
        }
        _ => None,
    })
}
