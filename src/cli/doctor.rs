//! `upcycle doctor`: what this machine offers and what this binary can do.

use anstream::println;
use indicatif::HumanBytes;
use sysinfo::{Disks, MemoryRefreshKind, RefreshKind, System};
use upcycle_architectures::{FAMILIES, kernels::Kernels, upcycle::TARGETS};
use upcycle_routers::init::METHODS;

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: Args) -> anyhow::Result<()> {
    let system = System::new_with_specifics(RefreshKind::nothing().with_memory(MemoryRefreshKind::everything()))?;
    println!("upcycle     {}", env!("CARGO_PKG_VERSION"));
    println!("features    {}", features().join(", "));
    println!("cpu         {} threads", rayon::current_num_threads());
    println!("kernels     {}", Kernels::available().into_iter().map(Kernels::name).collect::<Vec<_>>().join(", "));
    println!("memory      {} free of {}", HumanBytes(system.available_memory()), HumanBytes(system.total_memory()));
    let here = std::env::current_dir()?;
    if let Some((name, free)) = free_space(&here) {
        println!("disk        {} free on {name}", HumanBytes(free));
    }
    for device in ["cuda", "metal"] {
        match upcycle::engine::device::pick(device) {
            Ok(_) => println!("{device:<11} available"),
            Err(reason) => println!("{device:<11} {reason}"),
        }
    }
    println!("reads       {}", FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", "));
    println!("writes      {}", TARGETS.iter().map(|target| target.family.model_type).collect::<Vec<_>>().join(", "));
    println!("gate modes  {}", METHODS.iter().map(|method| method.name).collect::<Vec<_>>().join(", "));
    Ok(())
}

fn features() -> Vec<&'static str> {
    let all = [
        ("hub", cfg!(feature = "hub")),
        ("serve", cfg!(feature = "serve")),
        ("cuda", cfg!(feature = "cuda")),
        ("metal", cfg!(feature = "metal")),
        ("mkl", cfg!(feature = "mkl")),
        ("accelerate", cfg!(feature = "accelerate")),
    ];
    all.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect()
}

/// Mount point and free bytes of the disk that holds the path.
pub(crate) fn free_space(path: &std::path::Path) -> Option<(String, u64)> {
    let disks = Disks::new_with_refreshed_list().ok()?;
    let holding = disks.iter().filter(|disk| path.starts_with(disk.mount_point()));
    let disk = holding.max_by_key(|disk| disk.mount_point().as_os_str().len())?;
    Some((disk.mount_point().display().to_string(), disk.available_space()))
}
