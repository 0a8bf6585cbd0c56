/*
 * ppt: takes PCI functions for passing them through. It keeps the host's drivers
 * off those that the tunables pptdevs, pptdevs2 and pptdevs3 name, as
 * "bus/slot/func" with blanks between.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/bus.h>
#include <sys/kernel.h>
#include <sys/lock.h>
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

struct ppt_softc {
	device_t	dev;
	void		*vm;	/* whose it is, NULL: nobody's */
};

/* Whether a list of "bus/slot/func" has this one. */
static bool
listed(const char *list, int bus, int slot, int func)
{
	const char *s;
	char *end;
	long is[3];
	int i;

	for (s = list; *s != '\0'; s = end) {
		for (i = 0; i < 3; i++) {
			is[i] = strtol(s, &end, 10);
			/* The rest of a malformed list names nothing. */
			if (end == s || (i < 2 && *end != '/'))
				return (false);
			s = end + (i < 2);
		}
		if (is[0] == bus && is[1] == slot && is[2] == func)
			return (true);
		while (*end == ' ')
			end++;
	}
	return (false);
}

static int
ppt_probe(device_t dev)
{
	static const char *const tunables[] = { "pptdevs", "pptdevs2",
	    "pptdevs3" };
	char *list;
	u_int i;
	bool found = false;

	/* Not bridges. */
	if (pci_get_domain(dev) != 0 || (pci_read_config(dev, PCIR_HDRTYPE, 1) &
	    PCIM_HDRTYPE) != PCIM_HDRTYPE_NORMAL)
		return (ENXIO);
	for (i = 0; i < nitems(tunables) && !found; i++) {
		list = kern_getenv(tunables[i]);
		if (list == NULL)
			continue;
		found = listed(list, pci_get_bus(dev), pci_get_slot(dev),
		    pci_get_function(dev));
		freeenv(list);
	}
	if (!found)
		return (ENXIO);
	device_set_desc(dev, "PCI passthrough");
	return (BUS_PROBE_SPECIFIC);
}

static int
ppt_attach(device_t dev)
{
	struct ppt_softc *sc = device_get_softc(dev);

	sc->dev = dev;
	devices++;
	return (0);
}

static int
ppt_detach(device_t dev)
{
	struct ppt_softc *sc = device_get_softc(dev);

	if (sc->vm != NULL)
		return (EBUSY);
	devices--;
	return (0);
}

static device_method_t ppt_methods[] = {
	DEVMETHOD(device_probe,		ppt_probe),
	DEVMETHOD(device_attach,	ppt_attach),
	DEVMETHOD(device_detach,	ppt_detach),
	DEVMETHOD_END
};

static driver_t ppt_driver = { "ppt", ppt_methods, sizeof(struct ppt_softc) };

#if __FreeBSD_version < 1400000
static devclass_t ppt_class;
DRIVER_MODULE(ppt, pci, ppt_driver, ppt_class, NULL, NULL);
#else
DRIVER_MODULE(ppt, pci, ppt_driver, NULL, NULL);
#endif
MODULE_DEPEND(vmm, pci, 1, 1, 1);
