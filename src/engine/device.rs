//! Where a model runs and in which type it computes: what the user wants, and what is there.

use std::str::FromStr;

use candle_core::{DType, Device};
use upcycle_architectures::Config;

/// The device that the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// a GPU if this build and machine have one
    #[default]
    Auto,
    /// the processor
    Cpu,
    /// an NVIDIA GPU by its number
    Cuda(usize),
    /// an Apple GPU
    Metal,
}

/// The type that the user wants to compute in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DtypeChoice {
    /// f32 on the processor, the model's own on a GPU
    #[default]
    Auto,
    /// this one
    Exactly(DType),
}

/// Why there is no device, or no such choice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// not the name of a device
    #[error("`{0}` is none of `auto`, `cpu`, `cuda`, `cuda:N`, `metal`")]
    Name(String),
    /// not the name of a type
    #[error("`{0}` is none of `auto`, `f32`, `f16`, `bf16`")]
    Dtype(String),
    /// the device does not answer, or this build cannot speak to it
    #[error("cannot use {device}: {reason}")]
    Unavailable {
        /// as in the command line
        device: String,
        /// the driver's words
        reason: String,
    },
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Name(name.to_owned());
        Ok(match name.split_once(':') {
            None if name == "auto" => Self::Auto,
            None if name == "cpu" => Self::Cpu,
            None if name == "cuda" => Self::Cuda(0),
            None if name == "metal" => Self::Metal,
            Some(("cuda", number)) => Self::Cuda(number.parse().map_err(|_| unknown())?),
            _ => return Err(unknown()),
        })
    }
}

impl FromStr for DtypeChoice {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, DeviceError> {
        Ok(match name {
            "auto" => Self::Auto,
            "f32" => Self::Exactly(DType::F32),
            "f16" => Self::Exactly(DType::F16),
            "bf16" => Self::Exactly(DType::BF16),
            _ => return Err(DeviceError::Dtype(name.to_owned())),
        })
    }
}

/// The device of that name: `auto`, `cpu`, `cuda`, `cuda:N` or `metal`.
pub fn pick(name: &str) -> Result<Device, DeviceError> {
    Ok(open(name.parse()?)?.0)
}

/// The device, and where the choice was `Auto`, why the devices before it were passed over.
pub fn open(choice: DeviceChoice) -> Result<(Device, Vec<DeviceError>), DeviceError> {
    let cuda = |number| answer(format!("cuda:{number}"), Device::new_cuda(number));
    let metal = || answer("metal".to_owned(), Device::new_metal(0));
    Ok(match choice {
        DeviceChoice::Cpu => (Device::Cpu, Vec::new()),
        DeviceChoice::Cuda(number) => (cuda(number)?, Vec::new()),
        DeviceChoice::Metal => (metal()?, Vec::new()),
        DeviceChoice::Auto => {
            let mut passed = Vec::new();
            let tries: [&dyn Fn() -> Result<Device, DeviceError>; 2] = [&|| cuda(0), &metal];
            let found = tries.iter().find_map(|open| open().map_err(|error| passed.push(error)).ok());
            (found.unwrap_or(Device::Cpu), passed)
        }
    })
}

/// Drivers answer with back traces; their first line says what is wrong.
fn answer(device: String, result: candle_core::Result<Device>) -> Result<Device, DeviceError> {
    result.map_err(|error| {
        let reason = error.to_string().lines().next().unwrap_or_default().to_owned();
        DeviceError::Unavailable { device, reason }
    })
}

/// The type to compute in where every digit counts: f32 on the CPU.
pub fn dtype(choice: DtypeChoice, device: &Device, config: &Config) -> DType {
    match (choice, config.dtype.map(upcycle_architectures::Dtype::candle)) {
        (DtypeChoice::Exactly(dtype), _) => dtype,
        (DtypeChoice::Auto, Some(own @ (DType::BF16 | DType::F16))) if !device.is_cpu() => own,
        (DtypeChoice::Auto, _) => DType::F32,
    }
}

/// The type to generate text in: that of the weights where it is faster than f32.
pub fn serving_dtype(choice: DtypeChoice, device: &Device, config: &Config) -> DType {
    match (choice, config.dtype) {
        (DtypeChoice::Auto, Some(upcycle_architectures::Dtype::Bf16)) => DType::BF16,
        _ => dtype(choice, device, config),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_others_refused() {
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        for wrong in ["gpu", "cuda:", "cuda:x", "cpu:1", ""] {
            assert_eq!(wrong.parse::<DeviceChoice>(), Err(DeviceError::Name(wrong.into())));
        }
        assert_eq!("bf16".parse(), Ok(DtypeChoice::Exactly(DType::BF16)));
        assert!("q4".parse::<DtypeChoice>().is_err());
    }

    #[test]
    fn auto_always_finds_a_device_and_says_what_it_passed_over() {
        let (device, passed) = open(DeviceChoice::Auto).unwrap();
        assert_eq!(device.is_cpu(), passed.len() == 2, "{passed:?}");
        assert!(open(DeviceChoice::Cpu).unwrap().0.is_cpu());
        if let Err(error) = open(DeviceChoice::Cuda(99)) {
            assert_eq!(error.to_string().lines().count(), 1);
        }
    }
}
