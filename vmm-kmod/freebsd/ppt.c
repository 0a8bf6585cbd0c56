/*
 * ppt: takes PCI functions for passing them through: those that the tunables
 * pptdevs, pptdevs2 and pptdevs3 name, and those that devctl(8) gives it.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/bus.h>
#include <sys/kernel.h>
#include <sys/malloc.h>
#include <sys/module.h>
#include <sys/sysctl.h>

#include <dev/pci/pcireg.h>
#include <dev/pci/pcivar.h>

#include "shim.h"

SYSCTL_DECL(_hw_vmm);
SYSCTL_NODE(_hw_vmm, OID_AUTO, ppt, CTLFLAG_RW, NULL, "PCI passthrough");

static int devices;
SYSCTL_INT(_hw_vmm_ppt, OID_AUTO, devices, CTLFLAG_RD, &devices, 0,
    "functions that can be passed through");
int vmm_host_unsafe_groups;
SYSCTL_INT(_hw_vmm_ppt, OID_AUTO, unsafe_groups, CTLFLAG_RWTUN,
    &vmm_host_unsafe_groups, 0, "pass functions that reach others (no ACS)");

static int
ppt_probe(device_t dev)
{

	if (pci_get_domain(dev) != 0)
		return (ENXIO);
	device_set_desc(dev, "PCI passthrough");
	/* Others only where the administrator names this driver. */
	return (vmm_rust_ppt_wanted(pci_get_rid(dev)) ? BUS_PROBE_SPECIFIC :
	    BUS_PROBE_NOWILDCARD);
}

static int
ppt_attach(device_t dev)
{
	int error = vmm_rust_ppt_add(dev, NULL, NULL, 0, pci_get_rid(dev));

	devices += error == 0;
	return (error);
}

static int
ppt_detach(device_t dev)
{

	if (vmm_rust_ppt_busy(dev))
		return (EBUSY);
	vmm_rust_ppt_remove(dev);
	devices--;
	return (0);
}

/* The ports above have resumed. */
static int
ppt_resume(device_t dev)
{

	return (vmm_rust_ppt_resume(dev));
}

/* For vmm-kmod/kmod/src/ppt/freebsd.rs, what is a method or inline here. */
uint32_t
vmm_host_ppt_config(device_t dev, int at, const uint32_t *value)
{

	if (value != NULL)
		pci_write_config(dev, at, *value, 4);
	return (pci_read_config(dev, at, 4));
}

/* MSI or MSI-X with *n vectors; with n NULL whichever is on goes off. */
int
vmm_host_ppt_msi(device_t dev, int *n, int msix)
{

	if (n == NULL)
		return (pci_release_msi(dev));
	return (msix ? pci_alloc_msix(dev, n) : pci_alloc_msi(dev, n));
}

static device_method_t ppt_methods[] = {
	DEVMETHOD(device_probe,		ppt_probe),
	DEVMETHOD(device_attach,	ppt_attach),
	DEVMETHOD(device_detach,	ppt_detach),
	DEVMETHOD(device_resume,	ppt_resume),
	DEVMETHOD_END
};

static driver_t ppt_driver = { "ppt", ppt_methods, 0 };

#if __FreeBSD_version < 1400000
static devclass_t ppt_class;
DRIVER_MODULE(ppt, pci, ppt_driver, ppt_class, NULL, NULL);
#else
DRIVER_MODULE(ppt, pci, ppt_driver, NULL, NULL);
#endif
MODULE_DEPEND(vmm, pci, 1, 1, 1);
